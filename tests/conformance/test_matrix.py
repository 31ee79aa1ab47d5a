"""Every variant of PEFT's LoRA is answered as PEFT answers it, unmerged, in a batch with others and with the base."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from lora_runtime.errors import AdapterRejected
from lora_runtime.model.base import PackedBackbone
from tests.conformance.cases import Case, case_params
from tests.conformance.families import FAMILIES, TEXTS, build_base
from tests.conformance.matrix_bench import Bench
from tests.oracle import relative_difference

BenchOf = Callable[[str], Bench]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchOf]:
    """A family's bench; one family's runtime is open at a time."""
    benches: dict[str, Bench] = {}

    def of(family: str) -> Bench:
        if family not in benches:
            for name in list(benches):
                benches.pop(name).close()
            root = tmp_path_factory.mktemp(family)
            benches[family] = Bench(build_base(family, root), root)
        return benches[family]

    yield of
    for opened in benches.values():
        opened.close()


@pytest.mark.parametrize("case", case_params())
def test_a_mixed_batch_answers_as_peft(case: Case, bench: BenchOf) -> None:
    served = bench(case.family)
    try:
        pair = [served.group(served.adapter(case, seed)) for seed in (0, 1)]
    except AdapterRejected:
        if case.may_be_refused:
            return
        raise
    groups = [*pair, served.plain(), served.alone()]
    random.Random(case.id).shuffle(groups)
    for group, outputs in zip(groups, served.run(groups), strict=True):
        group.check(outputs)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_swapped_adapter_fails_the_comparison(family: str, bench: BenchOf) -> None:
    """The tolerances are sharp: one adapter's head on another's hidden states is far outside them."""
    served = bench(family)
    plain = served.plain()
    other = served.group(served.adapter(Case(family, "other", "FEATURE_EXTRACTION", ranks=(5, 5)), 0))
    assert plain.resident is not None and other.resident is not None
    wrong = dataclasses.replace(plain.resident, slot=other.resident.slot, extras=other.resident.extras)
    swapped = dataclasses.replace(plain, resident=wrong)
    (right,), (outputs,) = served.run([plain]), served.run([swapped])
    plain.check(right)
    assert relative_difference(outputs, plain.expected) > 1e-2
    with pytest.raises(AssertionError):
        swapped.check(outputs)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_base_rows_are_bitwise_those_of_the_same_batch_with_lora_off(family: str, bench: BenchOf) -> None:
    served = bench(family)
    plain, alone = served.plain(), served.alone()
    rows = [*plain.rows, *alone.rows]
    runner, engine = served.runtime.runner, served.runtime.engine
    lengths = [row.sequence.num_tokens for row in rows]
    mixed = engine.call(lambda: runner.hidden_states(rows)).split(lengths)
    off = engine.call(lambda: runner.hidden_states(rows, lora=False)).split(lengths)
    for i in range(len(plain.rows)):
        assert not torch.allclose(mixed[i], off[i], atol=1e-3), "the adapter changed nothing"
    for i, want in enumerate(alone.expected, start=len(plain.rows)):
        if isinstance(runner._base.backbone, PackedBackbone):
            assert torch.equal(mixed[i], off[i])
        else:  # an adapter that has batches to itself leaves the base's rows in others
            assert torch.allclose(mixed[i], off[i], atol=1e-5)
        assert (mixed[i] - want).abs().max() < 1e-5


SCORES = {
    "single_label_classification": (3, lambda logits: logits.softmax(-1)),
    "multi_label_classification": (5, torch.sigmoid),
    "regression": (1, lambda logits: logits),
}


@pytest.mark.parametrize("problem", SCORES)
def test_scores_follow_the_problem_type(problem: str, bench: BenchOf) -> None:
    served = bench("bert")
    num_labels, scores_of = SCORES[problem]
    adapter = served.adapter(Case("bert", problem, labels=(num_labels, num_labels)), 0)
    labels = {str(i): f"row {i}" for i in range(num_labels)}
    config = {"model_type": "bert", "id2label": labels, "problem_type": problem}
    (adapter.folder / "config.json").write_text(json.dumps(config))
    group = served.group(adapter)
    texts = [text if pair is None else (text, pair) for text, pair in TEXTS]
    for logits, found in zip(group.expected, served.runtime.classify(group.name, texts), strict=True):
        assert list(found.scores) == list(labels.values())
        assert torch.allclose(torch.tensor(list(found.scores.values())), scores_of(logits), atol=1e-5)
