"""A base at another place or in another precision than it is proved in; what is not to be had is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_runtime.adapters.image import to_half
from lora_runtime.batch import Row
from lora_runtime.errors import AdapterFailed, AdapterRejected, BaseModelUnsupported
from lora_runtime.model import load
from lora_runtime.model.placement import Placement, place_modules, resolve_placement
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import AdapterRef
from tests.oracle import ALL_LINEAR, make_adapter

TEXTS = ["Short.", "what time does the train to the coast leave tomorrow", "I would like to cancel my card."]
HALVES = {torch.bfloat16: 0.03, torch.float16: 0.004}  # relative error of logits: rounding in two layers and a head


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_base_in_half_precision_answers_as_peft_does_in_it(
    tiny_bert: Path, tmp_path: Path, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if dtype is torch.bfloat16:
            pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    name = str(dtype).removeprefix("torch.")
    with Runtime(tiny_bert, RuntimeSettings(arena_bytes=1 << 20, dtype=name, backend=backend)) as runtime:
        for seed, label in enumerate(("one", "two")):
            runtime.load(make_adapter(tiny_bert, tmp_path / label, targets=ALL_LINEAR, seed=seed))
        for label in ("one", "two"):
            found = torch.tensor([[*a.scores.values()] for a in runtime.classify(label, TEXTS)])
            want, other = (_peft(tiny_bert, tmp_path / folder, dtype) for folder in (label, _other(label)))
            assert (found - want).norm() / want.norm() < HALVES[dtype]
            assert (found - other).norm() / other.norm() > 4 * HALVES[dtype], "another adapter's answers would pass"


def _other(label: str) -> str:
    return "two" if label == "one" else "one"


def _peft(base: Path, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=3, dtype=dtype)
    adapted = PeftModel.from_pretrained(model, str(folder)).to(dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    with torch.inference_mode():
        logits = [adapted(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    return torch.stack(logits).float().softmax(-1)


def test_half_precision_takes_half_the_arena(tiny_bert: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_bert, tmp_path / "one")
    used = []
    for dtype in ("float32", "float16"):
        settings = RuntimeSettings(arena_bytes=1 << 20, dtype=dtype, backend="reference")
        with Runtime(tiny_bert, settings) as runtime:
            used.append(runtime.load(folder).resident_bytes)
    assert used[0] == 2 * used[1]


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    special = [
        0.0,
        -0.0,
        1e-40,
        -3e-5,
        2e-8,
        float("inf"),
        -float("inf"),
        float("nan"),
        60000.0,
        1.00390625,
        1.01171875,
    ]
    values = torch.cat([torch.randn(4096, generator=torch.Generator().manual_seed(0)), torch.tensor(special)])
    found = torch.from_numpy(to_half(values.numpy(), dtype)).view(dtype)
    assert torch.equal(found.nan_to_num(nan=7.0), values.to(dtype).nan_to_num(nan=7.0))
    assert found.isnan().equal(values.isnan())


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 7e4), (torch.bfloat16, 3.4e38)])
def test_a_weight_beyond_the_range_is_refused(dtype: torch.dtype, value: float) -> None:
    with pytest.raises(AdapterRejected, match=r"is beyond b?float16; serve with dtype float32"):
        to_half(np.array([1.0, -value], dtype=np.float32), dtype)


def test_adapters_with_such_weights_fail_and_say_so(tiny_bert: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_bert, tmp_path / "large")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] = 1e5
    save_file(weights, folder / "adapter_model.safetensors")
    settings = RuntimeSettings(arena_bytes=1 << 20, dtype="float16", backend="reference")
    with Runtime(tiny_bert, settings) as runtime, pytest.raises(AdapterFailed, match="1e\\+05 is beyond float16"):
        runtime.load(folder)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"dtype": "float64"}, ["dtype 'float64'", "float32, bfloat16, float16"]),
        ({"device": "tpu9"}, ["device 'tpu9'", "cpu, cuda"]),
        ({"device": "mps"}, ["device 'mps'", "cpu, cuda"]),
        ({"dtype": "bfloat16"}, ["dtype bfloat16 is not served on cpu", "use dtype float32, or device cuda"]),
        ({"dtype": "bfloat16", "backend": "reference", "quantize": "int8"}, ["int8", "use dtype float32"]),
    ],
)
def test_what_is_not_to_be_had_is_refused_with_the_remedy(
    tiny_bert: Path, settings: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(BaseModelUnsupported) as caught:
        Runtime(tiny_bert, RuntimeSettings(arena_bytes=1 << 20, **settings))
    for part in parts:
        assert part in caught.value.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(BaseModelUnsupported, match=r"device 'cuda' is not available: .*; use cpu"):
        resolve_placement("cuda", "bfloat16")


def test_a_cuda_device_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_placement("cuda", "float16").device == torch.device("cuda", 0)
    with pytest.raises(BaseModelUnsupported, match="'cuda:2' is not available: there are 2"):
        resolve_placement("cuda:2", "float16")


def test_what_modules_share_stays_shared_and_frequencies_stay_exact() -> None:
    one, two = nn.Linear(3, 3), nn.Module()
    two.weight = one.weight
    two.register_buffer("frequencies", torch.rand(3), persistent=False)
    two.register_buffer("table", torch.rand(3))
    two.register_buffer("ids", torch.arange(3))
    place_modules([one, two], Placement(torch.device("cpu"), torch.bfloat16))
    assert one.weight is two.weight and isinstance(one.weight, nn.Parameter)
    kinds = {name: value.dtype for name, value in [*two.named_buffers(), *two.named_parameters()]}
    assert kinds == {
        "frequencies": torch.float32, "table": torch.bfloat16, "ids": torch.int64, "weight": torch.bfloat16,
    }  # fmt: skip


def test_a_base_that_computes_something_else_at_its_place_is_refused(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(roots: list[nn.Module], placement: Placement) -> None:
        place_modules(roots, placement)
        next(p for name, p in roots[0].named_parameters() if name.endswith("weight") and p.dim() == 2).mul_(2)

    monkeypatch.setattr(load, "place_modules", broken)
    with pytest.raises(BaseModelUnsupported, match="computes something else than in float32"):
        load.load_base(tiny_bert, dtype="bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_runtime_on_cuda_answers_as_peft_does_by_graphs_that_were_captured_before(
    encoder_path: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    settings = RuntimeSettings(arena_bytes=64 << 20, host_bytes=64 << 20, device="cuda", dtype=name)
    with Runtime(encoder_path, settings) as runtime:
        for seed, label in enumerate(("one", "two")):
            runtime.load(make_adapter(encoder_path, tmp_path / label, seed=seed))
        runtime.warm_up()
        before = runtime.stats()
        assert before.num_graphs > 0
        for label in ("one", "two", "one"):
            found = torch.tensor([[*a.scores.values()] for a in runtime.classify(label, TEXTS)])
            want = _peft(encoder_path, tmp_path / label, torch.float32)
            assert (found - want).norm() / want.norm() < limit
        runtime.unload("one")
        one = runtime.engine.catalogue.resolve(AdapterRef.parse("one")).id
        runtime.engine.load(one).result()  # back from the host, into another slot
        again = torch.tensor([[*a.scores.values()] for a in runtime.classify("one", TEXTS)])
        assert (again - found).norm() / found.norm() < 1e-3
        after = runtime.stats()
        assert after.replayed_steps > before.replayed_steps
        assert (after.num_compiled, sum(after.eager_steps.values())) == (before.num_compiled, 0)


@pytest.mark.gpu
def test_a_step_on_cuda_waits_for_its_answer_alone(encoder_path: Path, tmp_path: Path) -> None:
    settings = RuntimeSettings(arena_bytes=64 << 20, host_bytes=64 << 20, device="cuda", dtype="float16")
    with Runtime(encoder_path, settings) as runtime:
        runtime.load(make_adapter(encoder_path, tmp_path / "one"))
        runtime.warm_up()
        runtime.classify("one", TEXTS)
        sequences = runtime.encoder.encode([(text, None) for text in TEXTS], max_length=None, truncate=False)
        (resident,) = runtime.engine.hold([runtime.engine.catalogue.resolve(AdapterRef.parse("one")).id]).values()
        rows = [Row(sequences[0]), *(Row(sequence, resident) for sequence in sequences[1:])]

        def step() -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                runtime.runner.hidden_states(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runtime.engine.call(step)
