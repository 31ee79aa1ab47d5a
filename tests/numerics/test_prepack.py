"""Prepacked projections: the same answers, whatever the class; where oneDNN fails, they stay as they are."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_runtime.batch import Row
from lora_runtime.model.load import load_base
from lora_runtime.model.probe import probe_step
from lora_runtime.model.wrapped import LoraLinear
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import TokenSequence


def linears(base: Any) -> list[LoraLinear]:
    return [module for module in base.backbone.inputs.module.modules() if isinstance(module, LoraLinear)]


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, encoder_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30522, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(encoder_path).save_pretrained(folder)
    return folder


def hidden(folder: Path, *, prepack: bool) -> torch.Tensor:
    rows = [Row(TokenSequence(tuple(range(5, 5 + n)), None)) for n in (1, 9, 30)]
    with Runtime(folder, RuntimeSettings(arena_bytes=1 << 20, prepack=prepack)) as runtime:
        assert all((linear.prepacked is not None) is prepack for linear in linears(runtime.runner._base))  # pyright: ignore[reportPrivateUsage]
        return runtime.engine.call(lambda: runtime.runner.hidden_states(rows))


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2"])
def test_prepacked_projections_compute_the_same(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    torch.testing.assert_close(hidden(folder, prepack=True), hidden(folder, prepack=False), atol=2e-5, rtol=0)


def test_projections_of_one_input_are_one_product(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    run = torch.ops.mkldnn._linear_pointwise

    class Counted:
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        def _linear_pointwise(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
            y = run(x, *rest)
            products.append(y.shape[-1])
            return y

    monkeypatch.setattr(torch.ops, "mkldnn", Counted())
    base = load_base(tiny_bert)
    products.clear()
    with torch.inference_mode():
        base.backbone.hidden([Row(TokenSequence((5, 6, 7), None))], lambda batch: probe_step(batch, base.spec.groups))
    width, inner, layers = 36, 52, len(products) // 4
    assert products == [3 * width, width, inner, width] * layers, "query, key and value; output; up; down"


def test_a_part_that_is_asked_for_again_is_computed_again(tiny_bert: Path) -> None:
    """Whoever takes a part adds an adapter's delta to it in place."""
    query, key, _ = linears(load_base(tiny_bert))[:3]
    x = torch.randn(1, 4, query.site.d_in)
    assert query.prepacked is not None and key.prepacked is not None
    with torch.inference_mode():
        wanted = query.base(x)
        query.prepacked(x, nothing)[0].add_(1.0)
        torch.testing.assert_close(query.prepacked(x, nothing)[0], wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(key.prepacked(x, nothing)[0], key.base(x), atol=2e-5, rtol=0)


def nothing(x: torch.Tensor, whole: torch.Tensor) -> bool:
    del x, whole
    return False


def test_an_architecture_that_cannot_view_slices_gets_its_projections_one_by_one(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = transformers.models.bert.modeling_bert.BertSelfAttention
    forward = attention.forward

    def strict(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.query(hidden_states).view(-1)
        return forward(self, hidden_states, *args, **kwargs)

    expected = hidden(tiny_bert, prepack=False)
    monkeypatch.setattr(attention, "forward", strict)
    torch.testing.assert_close(hidden(tiny_bert, prepack=True), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("fault", ["missing", "inexact"])
def test_where_onednn_is_missing_or_inexact_the_projections_stay_as_they_are(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    class Faulty:
        def _reorder_linear_weight(self, weight: torch.Tensor, _rows: None) -> torch.Tensor:
            if fault == "missing":
                raise NotImplementedError("not built with oneDNN")
            return weight

        def _linear_pointwise(self, x: torch.Tensor, weight: torch.Tensor, *_rest: object) -> torch.Tensor:
            return x @ weight.t() * 1.1

    monkeypatch.setattr(torch.ops, "mkldnn", Faulty())
    with caplog.at_level(logging.WARNING):
        base = load_base(tiny_bert)
    assert all(linear.prepacked is None for linear in linears(base))
    assert "projections are not prepacked" in caplog.text


@pytest.mark.slow
def test_compiled_products_of_many_batch_sizes_take_little_memory() -> None:
    """In a process of its own: the limits are read once. Without them it grows by 200 MB and more."""
    script = """
import torch
import lora_runtime.model.prepack
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
torch.set_num_threads(1)
with torch.inference_mode():
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(1536, 384), None)
    before = rss()
    for n in range(1, 400):
        torch.ops.mkldnn._linear_pointwise(torch.randn(n, 384), packed, None, "none", [], "")
print(rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 200
