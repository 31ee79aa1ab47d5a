"""A row of a mixed batch equals single-adapter PEFT in fp32; rows of the base are the base's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_runtime.batch import Batch, Row
from lora_runtime.heads import TaskHead
from lora_runtime.runtime import Runtime
from lora_runtime.types import AdapterRef, Task, TokenSequence
from tests.oracle import ALL_LINEAR, PeftOracle, make_adapter, make_task_adapter

# name → (rank, targets, labels, further LoraConfig fields)
ADAPTERS: dict[str, tuple[int, list[str] | str, int, dict[str, object]]] = {
    "r1-qv": (1, ["query", "value"], 2, {}),
    "r3-qv": (3, ["query", "value"], 3, {}),
    "r8-qv": (8, ["query", "value"], 77, {}),
    "r8-key": (8, ["key"], 4, {}),
    "r16-all": (16, ALL_LINEAR, 5, {}),
    "r64-all": (64, ALL_LINEAR, 151, {}),
    "r16-rslora": (16, ["query", "key", "value"], 6, {"use_rslora": True}),
    "r8-pooler": (8, "all-linear", 7, {}),
    "r4-patterns": (4, ["query", "value"], 1, {"rank_pattern": {"value": 12}, "alpha_pattern": {"layer.1.*query": 3}}),
    "r256-value": (256, ["value"], 2, {}),
    "pooler-replaced": (8, ["query"], 3, {"modules_to_save": ["classifier", "pooler"]}),
}
TEXTS = [
    "Short.",
    "A service that hosts many tenants on one machine must keep their answers apart.",
    "what time does the train to the coast leave tomorrow morning",
    "Prices rose again in the third quarter, the bureau said, though more slowly than analysts had feared; "
    "energy and rents led, while the cost of food fell for the first time in a year and a half.",
    "I would like to cancel my card.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, encoder_path: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(
            encoder_path, root / name, rank=rank, targets=targets, num_labels=labels, seed=seed, **config
        )
        for seed, (name, (rank, targets, labels, config)) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], encoder_path: Path) -> dict[str, list[torch.Tensor]]:
    """Per adapter and text, PEFT's logits."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, folder in folders.items():
        oracle = PeftOracle(encoder_path, folder, ADAPTERS[name][2])
        found[name] = [oracle.logits(text) for text in TEXTS]
    return found


@pytest.fixture(scope="module")
def runtime(folders: dict[str, Path], encoder_path: Path) -> Iterator[Runtime]:
    with Runtime(encoder_path) as runtime:
        for name, folder in folders.items():
            runtime.load(folder, name=name)
        yield runtime


def rows_of(runtime: Runtime, picks: list[tuple[str | None, int]]) -> list[Row]:
    """Rows for (adapter or None for the base, text), neighbours of one adapter adjacent as the engine orders them."""
    sequences = runtime.encoder.encode([(text, None) for text in TEXTS], max_length=None, truncate=False)
    residents = {
        name: runtime.engine._residency._records[runtime.engine.catalogue.resolve(AdapterRef.parse(name)).id].resident
        for name in ADAPTERS
    }
    rows = []
    for name, text in sorted(picks, key=lambda pick: str(pick[0])):
        if name is None:
            rows.append(Row(sequences[text]))
        else:
            resident = residents[name]
            assert resident is not None
            rows.append(Row(sequences[text], resident, Task.CLASSIFY))
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_every_row_of_a_random_mixed_batch_equals_peft(
    runtime: Runtime, expected: dict[str, list[torch.Tensor]], seed: int
) -> None:
    chance = random.Random(seed)
    picks = [(chance.choice([*ADAPTERS, None]), chance.randrange(len(TEXTS))) for _ in range(40)]
    picks.sort(key=lambda pick: str(pick[0]))
    outputs = runtime.runner.run(rows_of(runtime, picks))
    compared = 0
    for (name, text), logits in zip(picks, outputs, strict=True):
        if name is not None:
            want = expected[name][text]
            assert logits.shape == want.shape
            assert (logits - want).abs().max() < 1e-4
            assert (logits - want).norm() / want.norm() < 1e-5, f"{name} on text {text}"
            compared += 1
    assert compared > 20


def test_through_the_engine_all_adapters_at_once_equal_peft(
    runtime: Runtime, expected: dict[str, list[torch.Tensor]]
) -> None:
    for name in ADAPTERS:
        for text, prediction in enumerate(runtime.classify(name, TEXTS)):
            logits = expected[name][text]
            want = logits if len(logits) == 1 else logits.softmax(-1)
            assert torch.allclose(torch.tensor(list(prediction.scores.values())), want, atol=1e-5)


def test_base_rows_are_bitwise_equal_to_the_same_batch_with_lora_off(runtime: Runtime) -> None:
    picks: list[tuple[str | None, int]] = [(name, i % len(TEXTS)) for i, name in enumerate(ADAPTERS)]
    picks += [(None, 0), (None, 1), (None, 3)]
    rows = rows_of(runtime, picks)
    mixed = runtime.runner.hidden_states(rows)
    off = runtime.runner.hidden_states(rows, lora=False)
    cursor, base_rows = 0, 0
    for row in rows:
        part = slice(cursor, cursor + row.sequence.num_tokens)
        cursor += row.sequence.num_tokens
        if row.task is None:
            assert torch.equal(mixed[part], off[part])
            base_rows += 1
        else:
            assert not torch.allclose(mixed[part], off[part], atol=1e-3), "the adapter changed nothing"
    assert base_rows == 3


def test_batched_equals_alone(runtime: Runtime) -> None:
    picks: list[tuple[str | None, int]] = [(name, 1) for name in sorted(ADAPTERS)]
    batched = runtime.runner.run(rows_of(runtime, picks))
    for pick, together in zip(picks, batched, strict=True):
        alone = runtime.runner.run(rows_of(runtime, [pick]))[0]
        assert (alone - together).norm() / alone.norm() < 1e-5


def test_a_swapped_adapter_fails_the_comparison(runtime: Runtime, expected: dict[str, list[torch.Tensor]]) -> None:
    """The tolerance is sharp: the right head on the wrong adapter's hidden states is far outside it."""
    right, wrong = rows_of(runtime, [("r16-rslora", 1)]), rows_of(runtime, [("r3-qv", 1)])
    swapped = Row(right[0].sequence, replace(right[0].resident, slot=wrong[0].slot), Task.CLASSIFY)
    want = expected["r16-rslora"][1]
    assert (runtime.runner.run(right)[0] - want).norm() / want.norm() < 1e-5
    assert (runtime.runner.run([swapped])[0] - want).norm() / want.norm() > 1e-2


def test_text_pairs_equal_peft(runtime: Runtime, folders: dict[str, Path], encoder_path: Path) -> None:
    oracle = PeftOracle(encoder_path, folders["r16-all"], 5)
    pairs = [("Is it raining?", "It has been dry all week."), ("one", "two words")]
    for pair, prediction in zip(pairs, runtime.classify("r16-all", pairs), strict=True):
        want = oracle.logits(*pair).softmax(-1)
        assert torch.allclose(torch.tensor(list(prediction.scores.values())), want, atol=1e-5)


def test_an_image_takes_its_own_parameters_and_little_more(runtime: Runtime) -> None:
    for info in runtime.engine.catalogue.all():
        if all(rank % 8 == 0 for rank in info.ranks):
            assert info.resident_bytes <= 1.05 * 4 * info.num_parameters, info.id


def test_nothing_was_merged(runtime: Runtime, encoder_path: Path) -> None:
    from transformers import AutoModel

    original = AutoModel.from_pretrained(str(encoder_path)).state_dict()
    served = runtime.runner._base.backbone.inputs.module
    for site in runtime.runner._base.spec.sites:
        if not site.per_sequence:
            assert torch.equal(served.get_submodule(site.name).weight, original[f"{site.name}.weight"])


def test_a_long_text_does_not_make_the_head_pad_the_short_ones(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that read every token take padded rows: 60 of 2 tokens beside one of 60 would be 30 times as much."""
    config = {"r": 2, "target_modules": ["query"]}
    folder = make_task_adapter(tiny_bert, tmp_path / "tagger", "TOKEN_CLS", config, num_labels=4)
    padded: list[int] = []
    pad = TaskHead._pad

    def noting(self: TaskHead, batch: Batch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = pad(self, batch, hidden)
        padded.append(found[1].numel())
        return found

    with Runtime(tiny_bert) as runtime:
        adapter = runtime.load(folder).id
        resident = runtime.engine.hold([adapter])[adapter]
        ids = [tuple(range(1000, 1000 + n)) for n in (2, 60, *(2,) * 59)]
        rows = [Row(TokenSequence(row, None), resident, Task.CLASSIFY_TOKENS) for row in ids]
        monkeypatch.setattr(TaskHead, "_pad", noting)
        together = runtime.engine.call(lambda: runtime.runner.run(rows))
        assert sum(padded) <= 2 * sum(map(len, ids))
        for row, found in zip(rows[:3], together, strict=False):
            (alone,) = runtime.engine.call(lambda row=row: runtime.runner.run([row]))
            assert torch.allclose(found, alone, atol=1e-5)
