"""Quantised projections of the base: close to fp32, each row by itself, LoRA in fp32 beside them as PEFT adds it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lora_runtime.batch import Row
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.model import quantize
from lora_runtime.model.load import load_base
from lora_runtime.model.quantize import Int8Product, Quantization, QuantizedLinear, check_quantization, quantized_linear
from lora_runtime.model.wrapped import LoraLinear
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import Task, TokenSequence
from server.settings import SettingsError, resolve_settings
from tests.oracle import make_adapter, relative_difference

CPU = torch.device("cpu")
TARGETS = {"tiny_bert": ["query", "value", "output.dense"], "tiny_gpt2": ["c_attn", "c_fc"]}
LABELS = {"one": 3, "two": 5}
LENGTHS = (1, 9, 30, 4, 17)


def int8_is_served() -> bool:
    try:
        return check_quantization("int8", CPU) is Quantization.INT8
    except BaseModelUnsupported:
        return False


needs_vnni = pytest.mark.skipif(not int8_is_served(), reason="int8 products are not exact here: no VNNI")


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, encoder_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30522, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, initializer_range=0.2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(encoder_path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(TARGETS))
def base(request: pytest.FixtureRequest) -> tuple[Path, list[str]]:
    return request.getfixturevalue(request.param), TARGETS[request.param]


def make_adapters(base: Path, targets: list[str], folder: Path) -> None:
    for seed, (name, labels) in enumerate(LABELS.items()):
        make_adapter(
            base, folder / name, rank=3 + seed, targets=targets, num_labels=labels, seed=seed,
            fan_in_fan_out="c_attn" in targets,
        )  # fmt: skip


def random_rows(runtime: Runtime, folder: Path) -> tuple[list[Row], list[str]]:
    """Rows of both adapters, those of one adjacent."""
    ids = [runtime.load(folder / name).id for name in LABELS]
    residents = runtime.engine.hold(ids)
    generator = torch.Generator().manual_seed(5)
    rows, names = [], []
    for adapter in ids:
        for length in LENGTHS:
            tokens = tuple(torch.randint(1000, 30000, (length,), generator=generator).tolist())
            rows.append(Row(TokenSequence(tokens, None), residents[adapter], Task.CLASSIFY))
            names.append(adapter.name)
    return rows, names


def run(runtime: Runtime, rows: list[Row]) -> list[torch.Tensor]:
    return runtime.engine.call(lambda: list(runtime.runner.run(rows)))


def oracle(base: Path, folder: Path, labels: int, quantization: Quantization | None) -> nn.Module:
    """PEFT's model with one adapter, and in it the same quantised linears below PEFT's own LoRA."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=labels)
    adapted = PeftModel.from_pretrained(model, str(folder)).eval().requires_grad_(False)
    if quantization is None:
        return adapted
    backbone = adapted.base_model.model.get_submodule(model.base_model_prefix)
    for path, module in list(backbone.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and "lora_" not in path and "pooler" not in path:
            parent, _, child = path.rpartition(".")
            setattr(backbone.get_submodule(parent), child, quantized_linear(module, quantization))
    return adapted


def ask(models: dict[str, nn.Module], rows: list[Row], names: list[str]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [
            models[name](input_ids=torch.tensor([row.sequence.input_ids])).logits[0]
            for row, name in zip(rows, names, strict=True)
        ]


@needs_vnni
def test_mixed_rows_equal_peft_over_the_same_quantised_linears(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Up to activations between two steps, which fp32's last bit moves: far closer than fp32 or another adapter."""
    folder, targets = base
    make_adapters(folder, targets, tmp_path)
    with Runtime(folder, RuntimeSettings(arena_bytes=1 << 20, quantize="int8")) as runtime:
        rows, names = random_rows(runtime, tmp_path)
        found = run(runtime, rows)
    same, plain = (
        ask({n: oracle(folder, tmp_path / n, k, q) for n, k in LABELS.items()}, rows, names)
        for q in (Quantization.INT8, None)
    )
    exact = [relative_difference([a], [b]) < 1e-5 for a, b in zip(found, same, strict=True)]
    assert sum(exact) >= 0.8 * len(exact), [relative_difference([a], [b]) for a, b in zip(found, same, strict=True)]
    assert relative_difference(found, same) < 2e-3
    assert 1e-4 < relative_difference(found, plain) < 5e-2


@needs_vnni
def test_each_projection_adds_lora_of_the_unquantised_input(tmp_path: Path, tiny_bert: Path) -> None:
    """One projection at a time there is no rounding to amplify: 1e-5."""
    make_adapters(tiny_bert, TARGETS["tiny_bert"], tmp_path)
    model: Any = oracle(tiny_bert, tmp_path / "one", LABELS["one"], Quantization.INT8)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with Runtime(tiny_bert, RuntimeSettings(arena_bytes=1 << 20, quantize="int8")) as runtime:
        rows, names = random_rows(runtime, tmp_path)
        for module in runtime.runner._base.backbone.inputs.module.modules():  # pyright: ignore[reportPrivateUsage]
            if isinstance(module, LoraLinear):
                module.register_forward_hook(
                    lambda module, args, y: seen.update({module.path: (args[0].clone(), y.clone())})
                )
        run(runtime, rows)
    own = sum(row.sequence.num_tokens for row, name in zip(rows, names, strict=True) if name == "one")
    start = 0 if names[0] == "one" else sum(row.sequence.num_tokens for row in rows) - own
    assert len(seen) == 12
    for path, (x, y) in seen.items():
        with torch.inference_mode():
            want = model.base_model.model.bert.get_submodule(path)(x[0, start : start + own])
        assert relative_difference([y[0, start : start + own]], [want]) < 1e-5, path


def test_a_row_keeps_its_bits_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    linear = quantized_linear(nn.Linear(36, 52), Quantization.INT8)
    rows = torch.randn(40, 36)
    together = linear(torch.cat([rows, 1e4 * torch.randn(7, 36), torch.full((1, 36), torch.inf)]))
    assert torch.equal(together[:40], torch.cat([linear(row[None]) for row in rows]))
    assert not together[-1].isfinite().any()


@needs_vnni
def test_the_other_texts_of_a_batch_do_not_change_a_text(tmp_path: Path, tiny_bert: Path) -> None:
    make_adapters(tiny_bert, TARGETS["tiny_bert"], tmp_path)
    with Runtime(tiny_bert, RuntimeSettings(arena_bytes=1 << 20, quantize="int8")) as runtime:
        rows, _ = random_rows(runtime, tmp_path)
        other = [Row(TokenSequence(tuple(range(2000, 2000 + n)), None), row.resident, row.task)
                 for row, n in zip(rows, (LENGTHS * 2), strict=True)]  # fmt: skip
        beside = [*other[:3], rows[3], *other[4:]]  # the same shapes, so that fp32 rounds alike
        assert torch.equal(run(runtime, rows)[3], run(runtime, beside)[3])


@needs_vnni
def test_a_scale_of_the_whole_batch_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_all(rows: torch.Tensor) -> torch.Tensor:
        return (rows.abs().amax() / 127).expand(len(rows), 1)

    monkeypatch.setattr(quantize, "_steps", of_all)
    with pytest.raises(BaseModelUnsupported, match="depend on the rows beside them"):
        load_base(tiny_bert, quantize="int8")


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_an_adapters_own_weight_and_bias_are_not_quantised(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    linear = kind(36, 52) if kind is nn.Linear else kind(52, 36)
    quantized, x = quantized_linear(linear, Quantization.INT8), torch.randn(5, 36)
    own = {name: torch.randn_like(value) for name, value in linear.named_parameters()}
    before = quantized(x)
    torch.testing.assert_close(functional_call(quantized, own, x), functional_call(linear, own, x))
    bias = functional_call(quantized, {"bias": own["bias"]}, x)
    torch.testing.assert_close(bias, before - linear.get_parameter("bias") + own["bias"])
    assert torch.equal(quantized(x), before)


@needs_vnni
def test_projections_alone_are_quantised_and_adapters_still_read_the_weights(tiny_bert: Path) -> None:
    plain, int8 = load_base(tiny_bert, prepack=False), load_base(tiny_bert, quantize="int8")
    modules = [m for m in int8.backbone.inputs.module.modules() if isinstance(m, LoraLinear)]
    assert len(modules) == 12
    assert all(isinstance(m.base, QuantizedLinear) and m.prepacked is None for m in modules)
    assert sum(isinstance(m, Int8Product) for m in int8.backbone.inputs.module.modules()) == len(modules)
    assert int8.spec.fingerprint == plain.spec.fingerprint
    assert int8.spec.leaves == plain.spec.leaves
    assert int8.spec.parameters.keys() == plain.spec.parameters.keys()
    for name, value in plain.spec.parameters.items():
        assert np.array_equal(int8.spec.parameters[name], value), name
    assert isinstance(int8.spec.parameters[f"{modules[0].path}.weight"], np.memmap)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is for x86")
def test_a_processor_whose_products_saturate_is_refused() -> None:
    script = (
        "import torch\nfrom lora_runtime.model.quantize import check_quantization\n"
        "check_quantization('int8', torch.device('cpu'))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert "BaseModelUnsupported: quantize int8 is not exact on this processor" in done.stderr


@pytest.mark.parametrize("value", ["8bit", "4bit"])
def test_bitsandbytes_needs_cuda_and_itself(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseModelUnsupported, match=f"quantize {value} needs a base on a CUDA device.*use int8 or none"):
        check_quantization(value, CPU)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BaseModelUnsupported, match=r"pip install 'multilora\[quantized\]'"):
        check_quantization(value, torch.device("cuda", 0))


def test_other_values_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="'int4' is not known; use one of none, int8, 8bit, 4bit"):
        load_base(tiny_bert, quantize="int4")
    with pytest.raises(BaseModelUnsupported, match="int8 is for the CPU"):
        check_quantization("int8", torch.device("cuda", 0))


def test_the_flag_of_serve(tmp_path: Path) -> None:
    flags = {"base": "b", "adapters": str(tmp_path), "auth": "none"}
    assert resolve_settings(flags, {}).quantize == "none"
    assert resolve_settings(flags | {"quantize": "int8"}, {}).quantize == "int8"
    assert resolve_settings(flags, {"MULTILORA_QUANTIZE": "4bit"}).quantize == "4bit"
    with pytest.raises(SettingsError, match="--quantize"):
        resolve_settings(flags | {"quantize": "int4"}, {})


@pytest.mark.parametrize("value", [Quantization.BIT8, Quantization.BIT4])
def test_mixed_rows_equal_peft_over_the_same_bitsandbytes_linears(
    value: Quantization, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On bitsandbytes' own CPU path, which is for tests alone: served bases of this kind are on CUDA."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    monkeypatch.setattr("lora_runtime.model.load.check_quantization", lambda *_: value)
    make_adapters(tiny_gpt2, TARGETS["tiny_gpt2"], tmp_path)
    with Runtime(tiny_gpt2, RuntimeSettings(arena_bytes=1 << 20, quantize=value)) as runtime:
        rows, names = random_rows(runtime, tmp_path)
        found = run(runtime, rows)
    models = {n: oracle(tiny_gpt2, tmp_path / n, k, value) for n, k in LABELS.items()}
    same = ask(models, rows, names)
    assert relative_difference(found, same) < (2e-3 if value is Quantization.BIT8 else 1e-5)
    plain = ask({n: oracle(tiny_gpt2, tmp_path / n, k, None) for n, k in LABELS.items()}, rows, names)
    assert relative_difference(found, plain) > 3e-3


@pytest.mark.parametrize("value", [Quantization.BIT8, Quantization.BIT4])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bitsandbytes_projections_keep_rows_apart_and_are_close(value: Quantization, device: str) -> None:
    """As PEFT's base layers: below LoRA, which `LoraLinear` adds the same way whatever is below."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    torch.manual_seed(0)
    linear = nn.Linear(128, 192).requires_grad_(False).to(device)
    quantized = quantized_linear(linear, value)
    kind = bnb.nn.Linear8bitLt if value is Quantization.BIT8 else bnb.nn.Linear4bit
    assert isinstance(quantized.product, kind)
    quantize._check_rows_apart(quantized, 128, "query")
    x = torch.randn(9, 128, device=device)
    with torch.inference_mode():
        assert 1e-4 < relative_difference([quantized(x)], [linear(x)]) < (0.02 if value is Quantization.BIT8 else 0.15)
