"""The ways to compute a module with many adapters: ours, and what one would write in PyTorch.

A contender is a function from a problem to a turn: whatever it may keep from call to call is made before the turn,
whatever it must do in each layer of each step is in it. One that cannot run there raises NotMeasured with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from lora_runtime.kernels.grouped_lora import GroupedLora, GroupLora, grouped_lora
from lora_runtime.kernels.grouped_lora.registry import BackendResources, BackendSpec, choose_backend
from tests.benchmarks.kernels_problem import Problem

GATHER_LIMIT = {"cpu": 1 << 30, "cuda": 8 << 30}  # bytes of weights copied in one call


class NotMeasured(Exception):
    """A contender cannot run here; the message is for the result file."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is timed."""

    run: Callable[[], list[torch.Tensor]]  # the outputs of every site
    padded: bool = False  # outputs are [segments, longest, d_out] instead of [num_tokens, d_out]
    adapted: bool = True  # False: the base alone
    on_host: bool = False  # the host makes part of each call's input, so that a CUDA graph cannot stand for it


Contender = Callable[[Problem], Turn]


def floor(problem: Problem) -> Turn:
    """The linears without adapters."""
    return Turn(problem.base, adapted=False)


def merged(problem: Problem) -> Turn:
    """The ceiling: linears whose weights have one adapter merged in."""
    if problem.case.num_adapters > 1:
        raise NotMeasured("a merged weight serves one adapter")
    (adapter,) = problem.adapters
    weights = [
        (w.double() + adapter.scaling * b.double().T @ a.double()).to(problem.dtype)
        for w, a, b in zip(problem.weights, adapter.a, adapter.b, strict=True)
    ]
    pairs = list(zip(weights, problem.biases, strict=True))
    return Turn(lambda: [functional.linear(problem.x, weight, bias) for weight, bias in pairs])


def own(problem: Problem) -> Turn:
    """The runtime's backend for the device, in a step whose adapters are those of the step before.

    On CUDA as it serves there: one product for all sites, and one launch that adds their deltas.
    """
    backend = _make(_own_backend(problem), problem)
    plan = problem.plan()

    def run() -> list[torch.Tensor]:
        outs = problem.base()
        grouped_lora(backend, problem.x, problem.group, plan, dict(enumerate(outs)))
        return outs

    if problem.device.type != "cuda" or not isinstance(backend, GroupLora):
        return Turn(run)
    weight, bias = torch.cat(problem.weights), torch.cat(problem.biases)

    def run_together() -> list[torch.Tensor]:
        whole = functional.linear(problem.x, weight, bias)  # [num_tokens, sum of d_out]
        backend.expand_group(backend.shrink(problem.x, problem.group, plan), problem.group, plan, whole)
        return list(whole.split(problem.case.shape.d_outs, dim=1))

    return Turn(run_together)


def own_first(problem: Problem) -> Turn:
    """The same in the first layer of a step with new adapters: nothing of the plan or its stacks is there yet."""
    spec = _own_backend(problem)
    kept = None if spec.name == "cpu" else _make(spec, problem)  # only the cpu backend keeps copies of matrices

    def run() -> list[torch.Tensor]:
        backend = _make(spec, problem) if kept is None else kept
        outs = problem.base()
        grouped_lora(backend, problem.x, problem.group, problem.plan(), dict(enumerate(outs)))
        return outs

    return Turn(run, on_host=True)


def loop(problem: Problem) -> Turn:
    """Two products per adapter and site, one per adapter for the A of all sites."""
    segments = [(torch.cat(adapter.a).T, adapter, slice(start, end)) for adapter, start, end in problem.segments]

    def run() -> list[torch.Tensor]:
        outs = problem.base()
        for a_t, adapter, rows in segments:
            shrunk = torch.mm(problem.x[rows], a_t)  # [rows, sites * rank]
            for site, out in enumerate(outs):
                h = shrunk[:, site * adapter.rank : (site + 1) * adapter.rank]
                out[rows].addmm_(h, adapter.b[site], alpha=adapter.scaling)
        return outs

    return Turn(run)


def gather_rows(problem: Problem) -> Turn:
    """Each row's own matrices by index_select, then one bmm per side."""
    rank = problem.max_rank
    widest = rank * max(len(problem.group.sites) * problem.group.d_in, *problem.case.shape.d_outs)
    num_bytes = problem.case.num_tokens * widest * problem.dtype.itemsize
    if num_bytes > GATHER_LIMIT[problem.device.type]:
        raise NotMeasured(f"it would copy {num_bytes / 2**30:.1f} GiB of matrices in each call")
    a, b = problem.stacked_a(), problem.stacked_b()
    counts = torch.tensor(problem.case.lengths, device=problem.device)
    owner = torch.tensor(problem.order, device=problem.device).repeat_interleave(counts)  # [num_tokens]

    def run() -> list[torch.Tensor]:
        outs = problem.base()
        shrunk = torch.bmm(problem.x[:, None, :], a.index_select(0, owner).transpose(1, 2))  # [T, 1, sites * rank]
        for site, out in enumerate(outs):
            h = shrunk[:, :, site * rank : (site + 1) * rank]
            out[:, None, :].baddbmm_(h, b[site].index_select(0, owner))
        return outs

    return Turn(run)


def padded_bmm(problem: Problem) -> Turn:
    """Segments padded to equal length, their matrices gathered in each call, then one bmm per side."""
    rank, a, b = problem.max_rank, problem.stacked_a(), problem.stacked_b()
    owner, x = torch.tensor(problem.order, device=problem.device), problem.padded_x

    def run() -> list[torch.Tensor]:
        outs = problem.base_of(x)
        shrunk = torch.bmm(x, a.index_select(0, owner).transpose(1, 2))  # [segments, longest, sites * rank]
        for site, out in enumerate(outs):
            out.baddbmm_(shrunk[:, :, site * rank : (site + 1) * rank], b[site].index_select(0, owner))
        return outs

    return Turn(run, padded=True)


def grouped_mm(problem: Problem) -> Turn:
    """`torch.nn.functional.grouped_mm` over stacks that are kept in batch order."""
    rank, order = problem.max_rank, list(problem.order)
    a_t = problem.stacked_a()[order].transpose(1, 2)  # [segments, d_in, sites * rank]
    b = [stack[order] for stack in problem.stacked_b()]
    ends = torch.tensor(problem.case.lengths).cumsum(0).to(problem.device, torch.int32)

    def run() -> list[torch.Tensor]:
        outs = problem.base()
        shrunk = functional.grouped_mm(problem.x, a_t, offs=ends)
        for site, out in enumerate(outs):
            out.add_(functional.grouped_mm(shrunk[:, site * rank : (site + 1) * rank], b[site], offs=ends))
        return outs

    try:
        run()
    except RuntimeError as error:
        raise NotMeasured(f"torch refuses it here: {str(error).splitlines()[0]}") from error
    return Turn(run)


TORCH_CONTENDERS: dict[str, Contender] = {
    "floor": floor,
    "merged": merged,
    "own": own,
    "own_first": own_first,
    "loop": loop,
    "gather_rows": gather_rows,
    "padded_bmm": padded_bmm,
    "grouped_mm": grouped_mm,
}


def _own_backend(problem: Problem) -> BackendSpec:
    return choose_backend(problem.device, problem.dtype)


def _make(spec: BackendSpec, problem: Problem) -> GroupedLora:
    return spec.make(BackendResources(problem.arena, problem.slots, problem.dtype))
