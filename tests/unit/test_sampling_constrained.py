"""Random logits under a constraint give output that validates; what cannot be compiled is refused with the reason."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_runtime.errors import InvalidRequest
from lora_runtime.sampling.constrained import Constraint, ConstraintCompiler, ConstraintKind
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.row import RowState
from lora_runtime.sampling.sampler import Sampler

VOCAB = 400  # more logits than the tokenizer has tokens
EOS, END_OF_TURN = 0, 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def made_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['{"name": "ada", "age": 36, "tags": ["a"]}', "2024-01-31"] * 9, trainer)
    return tokenizer


TOKENIZER = made_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> ConstraintCompiler:
    return ConstraintCompiler(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[EOS, END_OF_TURN], max_compiled=3)


def written(constraint: Constraint, seed: int, limit: int = 300) -> str:
    """Draw until EOS from random logits."""
    row = RowState(SamplingParams(seed=seed, temperature=2.0), [5], mask=constraint, eos_token_ids=[EOS])
    logits = torch.randn(limit, 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    tokens: list[int] = []
    for step in range(limit):
        is_complete = constraint.is_accepting
        allowed = np.flatnonzero(np.unpackbits(constraint.allowed(), bitorder="little"))
        assert (EOS in allowed) == is_complete
        token = Sampler().sample(logits[step], [row])[0].token_id
        assert token is not None and token in allowed
        row.append(token)
        if token in (EOS, END_OF_TURN):
            return TOKENIZER.decode(tokens, skip_special_tokens=False)
        tokens.append(token)
    raise AssertionError("the output did not end")


@pytest.mark.parametrize("seed", range(8))
def test_output_under_a_schema_validates(compiler: ConstraintCompiler, seed: int) -> None:
    text = written(compiler.compile(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA)), seed)
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("pattern", [r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]", r"(yes|no|maybe)( sir)?", "a{0,4}é?"])
@pytest.mark.parametrize("seed", range(3))
def test_output_under_a_regex_matches(compiler: ConstraintCompiler, pattern: str, seed: int) -> None:
    assert re.fullmatch(pattern, written(compiler.compile(ConstraintKind.REGEX, pattern), seed))


def test_constraints_of_one_text_are_independent_and_copies_go_on(compiler: ConstraintCompiler) -> None:
    first = compiler.compile(ConstraintKind.REGEX, "ab")
    second = compiler.compile(ConstraintKind.REGEX, "ab")
    a, b = (TOKENIZER.token_to_id(letter) for letter in "ab")
    first.accept(a)
    forked = first.copy()
    first.accept(b)
    assert (first.is_accepting, forked.is_accepting, second.is_accepting) == (True, False, False)
    forked.accept(b)
    second.accept(a)
    second.accept(b)
    assert forked.is_accepting and second.is_accepting
    first.accept(EOS)
    assert set(np.flatnonzero(np.unpackbits(first.allowed(), bitorder="little"))) <= {EOS, END_OF_TURN}


def test_a_token_that_was_not_allowed_leaves_no_token(compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(ConstraintKind.REGEX, "ab")
    constraint.accept(TOKENIZER.token_to_id("b"))
    assert not constraint.allowed().any()
    assert constraint.error is not None


def test_a_regex_that_takes_too_much_work_ends_with_the_reason(compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(ConstraintKind.REGEX, "(a?){500}a{500}")
    assert constraint.error is None
    for _ in range(1000):
        if not constraint.allowed().any():
            break
        constraint.accept(TOKENIZER.token_to_id("a"))
    assert constraint.error is not None and "too many" in constraint.error


REFUSED: list[tuple[ConstraintKind, Any, str]] = [
    (ConstraintKind.JSON_SCHEMA, '{"type": ', "is not JSON: Expecting value at line 1, column 10"),
    (ConstraintKind.JSON_SCHEMA, "[]", "is not a JSON object"),
    (ConstraintKind.JSON_SCHEMA, '{"type": "number2"}', "Invalid type: number2"),
    (ConstraintKind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}', "Unimplemented keys"),
    (ConstraintKind.JSON_SCHEMA, '{"x-guidance": {"lenient": true}, "uniqueItems": true}', "Unimplemented keys"),
    (ConstraintKind.JSON_SCHEMA, '{"$ref": "https://example.com/s"}', "not present in a registry"),
    (ConstraintKind.JSON_SCHEMA, '{"type": "string", "pattern": "("}', "unclosed group"),
    (ConstraintKind.JSON_SCHEMA, '{"a":' * 12_000 + "1" + "}" * 12_000, "bytes; it takes 1 to 65536"),
    (ConstraintKind.JSON_SCHEMA, '{"a":' * 9_000 + "1" + "}" * 9_000, "nested too deeply"),
    (ConstraintKind.REGEX, "(", "unclosed group"),
    (ConstraintKind.REGEX, "(?=a)b", "look-around"),
    (ConstraintKind.REGEX, "", "has 0 bytes; it takes 1 to 4096"),
    (ConstraintKind.REGEX, "é" * 2049, "has 4098 bytes"),
    (ConstraintKind.REGEX, "\ud800", "lone surrogate"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_compiled_is_refused(
    compiler: ConstraintCompiler, kind: ConstraintKind, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as caught:
        compiler.compile(kind, text)
    assert caught.value.field == f"constraint.{kind}"
    assert len(caught.value.description) < 300


def test_the_last_used_stay_compiled() -> None:
    compiler = ConstraintCompiler(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[EOS], max_compiled=2)
    for pattern in ("a", "b", "a", "c", "d", "a"):
        compiler.compile(ConstraintKind.REGEX, pattern)
        assert compiler.num_compiled <= 2
    with pytest.raises(InvalidRequest):
        compiler.compile(ConstraintKind.REGEX, "(")
    assert compiler.num_compiled == 2


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = ConstraintCompiler(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[EOS])
    with pytest.raises(InvalidRequest, match=re.escape("pip install 'multilora[constrained]'")):
        compiler.compile(ConstraintKind.REGEX, "a")
