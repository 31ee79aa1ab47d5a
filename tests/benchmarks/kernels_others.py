"""Other projects' ways to compute a module with many adapters, through their public interfaces.

They are measured where they can be imported; nothing here is needed to measure the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from tests.benchmarks.kernels_contenders import Contender, NotMeasured, Turn
from tests.benchmarks.kernels_problem import Adapter, Problem

VLLM_DEVICE = "cuda"
VLLM_DTYPES = (torch.float16, torch.bfloat16)
_KEPT: list[torch.Tensor] = []  # vLLM remembers matrices by address for good, so none may be reused for others


def peft(problem: Problem) -> Turn:
    """PEFT's `adapter_names`, one name for each segment of a padded batch."""
    names = [site.name for site in problem.group.sites]
    first, *others = range(len(problem.adapters))
    holder = get_peft_model(
        _holder(problem), _peft_config(problem.adapters[first], names), f"a{first}", autocast_adapter_dtype=False
    )
    for i in others:
        holder.add_adapter(f"a{i}", _peft_config(problem.adapters[i], names))
    holder.to(problem.device, problem.dtype).eval()
    layers = [holder.get_submodule(f"base_model.model.{name}") for name in names]
    with torch.no_grad():
        for site, layer in enumerate(layers):
            for i, adapter in enumerate(problem.adapters):
                layer.get_parameter(f"lora_A.a{i}.weight").copy_(adapter.a[site])
                layer.get_parameter(f"lora_B.a{i}.weight").copy_(adapter.b[site].T)
    owner, x = [f"a{i}" for i in problem.order], problem.padded_x
    return Turn(lambda: [layer(x, adapter_names=owner) for layer in layers], padded=True, on_host=True)


def polylora(problem: Problem) -> Turn:
    """PolyLoRA's layers: its Triton kernels on CUDA, its loop over segments elsewhere."""
    if problem.device.type == "cuda" and problem.dtype == torch.float32:
        raise NotMeasured("its kernels multiply fp32 as tf32, which is outside the tolerance")
    package, context = _module("polylora"), _module("polylora.context")
    holder = _holder(problem)
    names = [site.name for site in problem.group.sites]
    config = package.PolyLoraConfig(len(problem.adapters) + 1, problem.max_rank, names)  # one slot is its base's
    model = package.PolyLoraModel(holder, config).eval()
    for i, adapter in enumerate(problem.adapters):
        state = {f"{name}.lora_A.weight": a for name, a in zip(names, adapter.a, strict=True)}
        state |= {f"{name}.lora_B.weight": b.T for name, b in zip(names, adapter.b, strict=True)}
        model.adapter_store.add_adapter_from_peft_state_dict(f"a{i}", state, names, adapter.scaling * adapter.rank)
    x, layers = problem.padded_x, [holder.get_submodule(name) for name in names]
    owner = [f"a{i}" for i in problem.order]
    batch = model.prepare_lora_context(owner, problem.real.int(), *x.shape[:2], problem.device)

    def run() -> list[torch.Tensor]:
        with context.use_lora_context(batch):
            return [layer(x) for layer in layers]

    return Turn(run, padded=True, on_host=True)


def vllm(problem: Problem) -> Turn:
    """vLLM's `lora_shrink` and `lora_expand` with its default block sizes, after one linear for all sites.

    As its own layers do: every rank padded to the largest, scaling multiplied into B, an fp32 buffer between the
    two, and the deltas of all sites added in one launch.
    """
    if problem.device.type != VLLM_DEVICE:
        raise NotMeasured("its kernels are Triton for CUDA")
    if problem.dtype not in VLLM_DTYPES:
        raise NotMeasured("its kernels take fp16 and bf16")
    ops = _module("vllm.lora.ops.triton_ops")
    num_adapters, num_tokens = len(problem.adapters), problem.case.num_tokens
    shape, sites, rank = problem.case.shape, len(problem.group.sites), problem.max_rank
    stacked = problem.stacked_a().view(num_adapters, sites, rank, shape.d_in)
    a = [stacked[:, site].contiguous() for site in range(sites)]  # [adapters, rank, d_in]
    b = [stack.transpose(1, 2).contiguous() for stack in problem.stacked_b()]  # [adapters, d_out, rank]
    _KEPT.extend([*a, *b])
    counts = torch.tensor(problem.case.lengths, device=problem.device)
    owner = torch.tensor(problem.order, device=problem.device).repeat_interleave(counts)  # [num_tokens]
    meta = ops.LoRAKernelMeta.make(num_adapters, num_tokens, problem.device)
    meta.prepare_tensors(owner)
    batch = meta.meta_args(num_tokens, True)  # launched for the adapters of the batch, not for all that could be
    weight, bias = torch.cat(problem.weights), torch.cat(problem.biases)

    def run() -> list[torch.Tensor]:
        out = functional.linear(problem.x, weight, bias)  # [num_tokens, sum of d_out]
        shrunk = torch.empty(sites, num_tokens, rank, dtype=torch.float32, device=problem.device)
        ops.lora_shrink(problem.x, a, shrunk, *batch, 1.0)
        ops.lora_expand(shrunk, b, out, *batch, offset_start=0, add_inputs=True)
        return list(out.split(shape.d_outs, dim=1))

    return Turn(run)


OTHER_CONTENDERS: dict[str, Contender] = {"peft": peft, "polylora": polylora, "vllm": vllm}


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NotMeasured(f"it cannot be imported: {str(error).splitlines()[0]}") from error


def _holder(problem: Problem) -> nn.Module:
    """A model of nothing but the module's linears."""
    holder = nn.Module()
    for site, weight, bias in zip(problem.group.sites, problem.weights, problem.biases, strict=True):
        linear = nn.Linear(site.d_in, site.d_out, device=problem.device, dtype=problem.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        holder.add_module(site.name, linear)
    return holder


def _peft_config(adapter: Adapter, names: list[str]) -> LoraConfig:
    return LoraConfig(r=adapter.rank, lora_alpha=int(adapter.scaling * adapter.rank), target_modules=names)
