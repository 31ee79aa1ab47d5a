"""A tokenizer beside an adapter counts only where it differs from the base's, and never beyond the embedding's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.plan import read_card
from lora_runtime.adapters.tokenizer import tokenizer_digest
from lora_runtime.errors import AdapterRejected
from tests.unit.base_specs import VOCABULARY, spec_of
from tests.unit.peft_folders import NO_LIMIT, save

WORDS = {f"w{i}": i for i in range(VOCABULARY)}


def tokenizer(words: dict[str, int] = WORDS) -> Tokenizer:
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.fixture
def base() -> BaseSpec:
    return spec_of("bert", tokenizer_digest=tokenizer_digest(tokenizer().to_str()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("bert", "FEATURE_EXTRACTION", tmp_path / "a", target_modules=["query"])


def test_the_bases_own_tokenizer_is_passed_over(folder: Path, base: BaseSpec) -> None:
    before = read_checkpoint(folder, base, NO_LIMIT)
    saved = tokenizer()
    saved.enable_truncation(8)
    saved.enable_padding(length=8)
    saved.save(str(folder / "tokenizer.json"))
    after = read_checkpoint(folder, base, NO_LIMIT)
    assert (after.card.tokenizer_sha256, after.digest) == (None, before.digest)


def test_another_tokenizer_is_on_the_card_and_part_of_the_identity(folder: Path, base: BaseSpec) -> None:
    before = read_checkpoint(folder, base, NO_LIMIT)
    tokenizer({f"x{i}": i for i in range(VOCABULARY)} | {"w0": 0}).save(str(folder / "tokenizer.json"))
    after = read_checkpoint(folder, base, NO_LIMIT)
    assert after.card.tokenizer_sha256 is not None
    assert after.digest != before.digest
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    configured = read_checkpoint(folder, base, NO_LIMIT)
    assert configured.card.tokenizer_sha256 not in (None, after.card.tokenizer_sha256)
    assert configured.digest not in (before.digest, after.digest)


def added(folder: Path, count: int) -> None:
    grown = tokenizer()
    grown.add_tokens([AddedToken(f"<{i}>") for i in range(count)])
    grown.save(str(folder / "tokenizer.json"))


def test_tokens_without_a_row_are_refused(folder: Path, base: BaseSpec) -> None:
    added(folder, 3)
    with pytest.raises(AdapterRejected, match="3 are missing") as caught:
        read_card(folder, base)
    assert caught.value.code == "TOKENIZER_UNSUPPORTED"


def test_tokens_whose_rows_the_adapter_brings_are_served(tmp_path: Path, base: BaseSpec) -> None:
    grown = save("bert", "FEATURE_EXTRACTION", tmp_path / "grown", vocab_size=VOCABULARY + 3, save_embedding=True)
    added(grown, 3)
    assert read_card(grown, base).tokenizer_sha256 is not None
    added(grown, 4)
    with pytest.raises(AdapterRejected, match="1 are missing"):
        read_card(grown, base)


def test_new_tokens_may_be_trained_rows_alone(tmp_path: Path, base: BaseSpec) -> None:
    new = [VOCABULARY, VOCABULARY + 1]
    folder = save(
        "bert", "FEATURE_EXTRACTION", tmp_path / "a", vocab_size=VOCABULARY + 2, save_embedding=False,
        trainable_token_indices=new,
    )  # fmt: skip
    added(folder, 2)
    checkpoint = read_checkpoint(folder, base, NO_LIMIT)
    assert checkpoint.card.tokenizer_sha256 is not None
    ids = checkpoint.extras[base.word_embedding].row_ids
    assert ids is not None and ids.tolist() == new


@pytest.mark.parametrize(("content", "served"), [({"<a>": VOCABULARY - 1}, True), ({"<a>": VOCABULARY}, False)])
def test_added_tokens_alone_matter_only_beyond_the_rows(
    folder: Path, base: BaseSpec, content: dict[str, int], served: bool
) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(content))
    if served:
        assert read_card(folder, base).tokenizer_sha256 is None
        return
    with pytest.raises(AdapterRejected, match="1 are missing"):
        read_card(folder, base)


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens": [1]}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_tokenizer_that_is_none_is_refused(folder: Path, base: BaseSpec, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(AdapterRejected) as caught:
        read_card(folder, base)
    assert caught.value.where == "tokenizer.json"


def test_how_merges_are_written_does_not_matter() -> None:
    model: dict[str, Any] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    new = {"model": {**model, "merges": [["a", "b"]], "ignore_merges": False}}
    assert tokenizer_digest(json.dumps({"model": model})) == tokenizer_digest(json.dumps(new))
    other = {"model": {**model, "merges": [["b", "a"]]}}
    assert tokenizer_digest(json.dumps(new)) != tokenizer_digest(json.dumps(other))


@pytest.mark.parametrize(
    ("name", "content", "own"),
    [
        ("chat_template.jinja", "{{ messages }}", False),
        ("chat_template.jinja", "{{ messages[0] }}", True),
        ("tokenizer_config.json", '{"eos_token": {"content": "</s>"}}', False),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>"}', True),
        ("tokenizer_config.json", '{"chat_template": "{{ other }}"}', True),
    ],
)
def test_the_bases_vocabulary_with_another_template_or_end_is_another_tokenizer(
    tmp_path: Path, name: str, content: str, own: bool
) -> None:
    digest = tokenizer_digest(tokenizer().to_str())
    base = spec_of("llama", tokenizer_digest=digest, chat_template="{{ messages }}", eos_token="</s>")
    folder = save("llama", "CAUSAL_LM", tmp_path / "a", target_modules=["q_proj"])
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / name).write_text(content)
    assert (read_checkpoint(folder, base, NO_LIMIT).card.tokenizer_sha256 is not None) is own
