"""Adapters of different tasks share one batch, and each is answered as it is alone, and as PEFT answers it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.cases import CASES
from tests.conformance.families import build_base
from tests.conformance.matrix_bench import Bench, Group
from tests.oracle import relative_difference

TOGETHER: dict[str, list[str]] = {
    "bert": [
        "bert-seq_cls-dora",
        "bert-seq_cls-saved-embedding",
        "bert-token_cls-plain",
        "bert-token_cls-dora-bias-all",
        "bert-question_ans-trainable-tokens",
        "bert-feature_extraction-plain",
        "bert-feature_extraction-dora-saved-norms",
        "bert-seq_cls-regression",
    ],
    "llama": [
        "llama-seq_cls-linears",
        "llama-token_cls-plain",
        "llama-feature_extraction-plain",
        "llama-causal_lm-lm-head",
        "llama-causal_lm-saved-embedding-and-lm-head",
        "llama-causal_lm-alora",
    ],
}


@pytest.fixture(scope="module", params=TOGETHER)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root: Path = tmp_path_factory.mktemp(request.param)
    bench = Bench(build_base(request.param, root), root)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def groups(served: Bench) -> list[Group]:
    wanted = TOGETHER[served.base.name]
    cases = [case for case in CASES if case.id in wanted]
    assert len(cases) == len(wanted)
    made = [served.group(served.adapter(case, seed)) for case in cases for seed in (0, 1)]
    return [*made, served.plain(), served.alone()]


def test_every_task_of_one_batch_answers_as_peft(served: Bench, groups: list[Group]) -> None:
    for order in (groups, groups[::-1]):
        for group, outputs in zip(order, served.run(order), strict=True):
            group.check(outputs)


def test_every_task_of_one_batch_answers_as_it_does_alone(served: Bench, groups: list[Group]) -> None:
    for group, together in zip(groups, served.run(groups), strict=True):
        (alone,) = served.run([group])
        assert relative_difference(together, alone) < 1e-5, group.name
