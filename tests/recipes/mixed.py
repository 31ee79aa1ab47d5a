"""Adapters asked at the same time, and PEFT's own answers, one adapter and one text at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from lora_runtime.adapters.metadata import read_metadata
from lora_runtime.types import TokenSequence
from server.pb.multilora.v1 import inference_pb2
from tests.generation import GenerateOracle, make_generator
from tests.oracle import TaskOracle, make_task_adapter, relative_difference
from tests.recipes.cases import PROMPT
from tests.recipes.live import CALL_S, Live, answer_request, classify_request, generate_request
from tests.recipes.rows import Row

LIMIT = 1e-4  # relative to PEFT's own
NEW_TOKENS = 24
WINDOW = 192  # tokens that the readers read at once
_ALONE = 8  # rows of a request: small ones, so that those of all adapters meet in batches
_LONGEST_ANSWER = 30


class Differs(Exception):
    """The server's answer is not PEFT's; the message says of which adapter."""


def make_others(base: str, folder: Path, root: Path) -> dict[str, Path]:
    """Random adapters that the server has before any of ours, under `root`."""
    if base == "smollm2":
        options: dict[str, Any] = {"r": 8, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]}
        return {name: make_generator(folder, root / name, seed=n, **options) for n, name in enumerate(("one", "two"))}
    if base == "gpt2":
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    else:
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    names = ("one", "two", "three")
    for seed, name in enumerate(names):
        make_task_adapter(folder, root / name, "SEQ_CLS", options, num_labels=4, seed=seed)
    return {name: root / name for name in names}


def make_untuned_reader(folder: Path, out: Path) -> Path:
    """The base with a fresh head that nobody trained: LoRA's B is zero."""
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    get_peft_model(model, LoraConfig(task_type="QUESTION_ANS", target_modules=["query"])).save_pretrained(str(out))
    return out


class Mixed:
    """Requests of several adapters, sent together, and compared."""

    def __init__(self, live: Live, base: Path) -> None:
        self._live = live
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._limit: int = AutoConfig.from_pretrained(base).max_position_embeddings
        self._asked: list[list[tuple[Any, Any, Callable[[Any], float]]]] = []  # of each adapter: stub, request, check

    def classify(self, name: str, folder: Path, num_labels: int, rows: Sequence[Row]) -> None:
        oracle = TaskOracle(self._base, folder, "SEQ_CLS", num_labels=num_labels)
        metadata = read_metadata(folder)
        limit = (metadata and metadata.max_length) or self._limit
        want = [oracle.answer(self._sequence(row, limit)) for row in rows]
        stub = self._live.stub.Classify
        self._asked.append(
            [
                (stub, classify_request(name, part, return_logits=True), _Logits(wanted))
                for part, wanted in _small(rows, want)
            ]
        )

    def answer(self, name: str, folder: Path, rows: Sequence[Row]) -> None:
        """Contexts of one window each, so that PEFT sees what the server sees."""
        oracle = TaskOracle(self._base, folder, "QUESTION_ANS")
        rows = [row for row in rows if self._sequence(row).num_tokens <= WINDOW]
        want = [self._best_span(oracle, row) for row in rows]
        stub, options = self._live.stub.AnswerQuestion, {"max_answer_tokens": _LONGEST_ANSWER}
        self._asked.append(
            [(stub, answer_request(name, part, **options), _Spans(name, wanted)) for part, wanted in _small(rows, want)]
        )

    def generate(self, adapters: Mapping[str, Path], templated: str, rows: Sequence[Row]) -> None:
        """Each adapter continues each row's prompt; that of the name `templated` makes it of its own template."""
        oracle = GenerateOracle(self._base, adapters)
        stub = self._live.stub.Generate
        for name in adapters:
            asked: list[tuple[Any, Any, Callable[[Any], float]]] = []
            for row in rows:
                prompt = PROMPT.format(text=row.text)
                wanted = oracle.generate(name, self._tokenizer(prompt).input_ids, NEW_TOKENS).tokens
                given = {"fields": {"text": row.text}} if name == templated else {"text": prompt}
                asked.append((stub, generate_request(name, NEW_TOKENS, **given), _Tokens(name, wanted)))
            self._asked.append(asked)

    def compare(self) -> dict[str, Any]:
        """Send everything at once, the adapters in turns, and compare each reply with PEFT's; raises Differs."""
        turns = [item for turn in zip_longest(*self._asked) for item in turn if item is not None]
        calls = [(stub.future(request, timeout=CALL_S), check) for stub, request, check in turns]
        largest = max(check(call.result()) for call, check in calls)
        if largest > LIMIT:
            raise Differs(f"the largest relative difference from PEFT is {largest:.1e}, allowed is {LIMIT:.0e}")
        return {
            "adapters": len(self._asked),
            "requests": len(calls),
            "adapters_in_a_batch": self._live.adapters_in_a_batch(),
            "largest_difference": largest,
        }

    def _sequence(self, row: Row, limit: int | None = None) -> TokenSequence:
        """The row's tokens; where there is a limit, cut as a tokenizer cuts."""
        encoding = self._tokenizer(row.text, row.context or None, truncation=limit is not None, max_length=limit)
        types = encoding.get("token_type_ids")
        return TokenSequence(tuple(encoding.input_ids), None if types is None else tuple(types))

    def _best_span(self, oracle: TaskOracle, row: Row) -> tuple[float, str]:
        encoding = self._tokenizer(row.text, row.context, return_offsets_mapping=True)
        own = [index for index, part in enumerate(encoding.sequence_ids(0)) if part == 1]
        start, end = oracle.answer(self._sequence(row)).T.tolist()
        logit, i, j = max((start[i] + end[j], i, j) for i in own for j in own if 0 <= j - i < _LONGEST_ANSWER)
        offsets = encoding.offset_mapping
        return logit, row.context[offsets[i][0] : offsets[j][1]]


class _Logits:
    def __init__(self, wanted: Sequence[torch.Tensor]) -> None:
        self._wanted = wanted

    def __call__(self, reply: inference_pb2.ClassifyResponse) -> float:
        return relative_difference([torch.tensor(list(result.logits)) for result in reply.results], self._wanted)


class _Spans:
    def __init__(self, name: str, wanted: Sequence[tuple[float, str]]) -> None:
        self._name = name
        self._wanted = wanted

    def __call__(self, reply: inference_pb2.AnswerQuestionResponse) -> float:
        found = [result.answers[0] for result in reply.results]
        for answer, (_, text) in zip(found, self._wanted, strict=True):
            if answer.text != text:
                raise Differs(f"{self._name} answers {answer.text!r}, PEFT {text!r}")
        logits = torch.tensor([answer.logit for answer in found])
        return relative_difference([logits], [torch.tensor([logit for logit, _ in self._wanted])])


class _Tokens:
    def __init__(self, name: str, wanted: Sequence[int]) -> None:
        self._name = name
        self._wanted = list(wanted)

    def __call__(self, reply: inference_pb2.GenerateResponse) -> float:
        found = [token.token_id for token in reply.results[0].samples[0].tokens]
        if found != self._wanted:
            raise Differs(f"{self._name} writes the tokens {found}, PEFT {self._wanted}")
        return 0.0


def _small(rows: Sequence[Row], wanted: Sequence[Any]) -> list[tuple[Sequence[Row], Sequence[Any]]]:
    return [(rows[at : at + _ALONE], wanted[at : at + _ALONE]) for at in range(0, len(rows), _ALONE)]
