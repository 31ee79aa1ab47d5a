"""One task's head for every adapter of a batch at once, without per-architecture code.

The head is transformers' own task class with a stub in place of its backbone: the stub hands over hidden states that
are already computed (and the pooler's output, where the backbone has one), and the class does what it always does.
Its layers are replaced by `SequenceLinear` and `SequenceLeaf`, which give each row its own adapter's parameters, so one
call answers a batch of adapters with different numbers of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as StubOutput

from lora_runtime.adapters.base_spec import HeadSpec
from lora_runtime.batch import Batch, Row, Step, current_step
from lora_runtime.heads.sequence_leaf import SequenceLeaf, is_leaf
from lora_runtime.heads.sequence_linear import SequenceLinear
from lora_runtime.types import Site, SiteGroup, Task

PROBE_LABELS = 11  # an output width that no hidden size has
NUM_SPAN_OUTPUTS = 2  # of an extractive head: a span's first and last token
PAD, REAL = 0, 1  # token ids as heads see them: some pool by which tokens are padding, none by anything else


class StubBackbone(nn.Module):
    """Answers a task class with given hidden states; keeps the backbone's per-sequence children (its pooler)."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.hidden: torch.Tensor | None = None  # [N, L, d], set around each call

    def forward(self, *args: object, **kwargs: object) -> StubOutput:
        del args, kwargs
        assert self.hidden is not None
        pooler = self._modules.get("pooler")
        pooled = None if pooler is None else pooler(self.hidden)
        return StubOutput(last_hidden_state=self.hidden, pooler_output=pooled)  # pyright: ignore[reportArgumentType]


class TaskHead:
    """A task class around a stub; `spec` says what parameters an adapter brings."""

    def __init__(self, task: Task, model: nn.Module, prefix: str, children: dict[str, nn.Module], missing: set[str]):
        """`model` is the task class around the base; `missing` are its parameters that the base checkpoint lacks.

        Raises ValueError when the class has no single output layer.
        """
        self._stub = StubBackbone(children)
        setattr(model, prefix, self._stub)
        self._model = model.eval()
        leaves = {name: m for name, m in model.named_modules() if is_leaf(m)}
        linears = {name: m for name, m in leaves.items() if isinstance(m, nn.Linear)}
        self.spec = _head_spec(task, model, prefix, leaves, missing)
        self.sequence_linears: dict[str, nn.Module] = {
            _strip(name, prefix): linear for name, linear in linears.items() if f"{name}.weight" not in missing
        }
        self._layers: dict[str, SequenceLinear] = {}
        for name, leaf in leaves.items():
            own = _strip(name, prefix)
            if isinstance(leaf, nn.Linear):
                wrapped = self._layers[own] = SequenceLinear(own, leaf, f"{own}.weight" in self.spec.from_base)
            else:
                wrapped = SequenceLeaf(own, leaf)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrapped)
        self._output = self._layers[self.spec.output.rpartition(".")[0] or next(iter(self._layers))]
        self._first_token_only = False

    def set_sites(self, sites: tuple[Site, ...], groups: tuple[SiteGroup, ...]) -> None:
        """Make the layers that come from the base adaptable by LoRA."""
        for site in sites:
            if site.per_sequence and site.name in self._layers:
                self._layers[site.name].set_site(site, groups[site.group])

    def prepack_output(self, make: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor] | None]) -> None:
        """Have the output layer multiply by what `make` gives for it (see SequenceLinear)."""
        self._output.prepack(make)

    @property
    def module(self) -> nn.Module:
        """The task class, with what it has of the base's own layers."""
        return self._model

    @property
    def pads(self) -> bool:
        """Whether `run` pads every row to the longest, so that one long row among short ones would be dear."""
        return not (self._first_token_only or self.spec.task is Task.GENERATE)

    def run(self, step: Step, hidden: torch.Tensor) -> list[torch.Tensor]:
        """hidden [T, d] of the step's batch → per row what its task asks for.

        CLASSIFY: logits [labels]. CLASSIFY_TOKENS: [n, labels]. ANSWER: [n, 2]. GENERATE: [vocabulary].
        """
        rows = step.batch.rows
        input_ids, mask, padded = self._pad(step.batch, hidden)
        token = current_step.set(step)
        self._stub.hidden = padded
        try:
            logits = head_logits(self._model(input_ids=input_ids, attention_mask=mask))  # [N, (L,) widest]
        finally:
            self._stub.hidden = None
            current_step.reset(token)
        if self.spec.task in (Task.CLASSIFY_TOKENS, Task.ANSWER):
            return [
                logits[i, :n, : self._width(row)]
                for i, (row, n) in enumerate(zip(rows, step.batch.lengths, strict=True))
            ]
        if self.spec.task is Task.GENERATE:
            logits = logits[:, -1]
        return [logits[i, : self._width(row)] for i, row in enumerate(rows)]

    def next_token(self, step: Step, last: torch.Tensor) -> torch.Tensor:
        """last [N, d], the hidden states of the last tokens of the step's sequences → logits [N, widest vocabulary].

        Beyond the tokens that a sequence's adapter can read again there is -inf.
        """
        assert self.spec.task is Task.GENERATE, f"a {self.spec.task} head has no next token"
        token = current_step.set(step)
        self._stub.hidden = last[:, None]
        ids = torch.full((len(last), 1), REAL, device=last.device)
        try:
            logits = head_logits(self._model(input_ids=ids, attention_mask=ids))[:, -1]
        finally:
            self._stub.hidden = None
            current_step.reset(token)
        for i, row in enumerate(step.batch.rows):
            known = row.resident.card.num_token_ids  # an output layer may be longer than the embedding: padded
            width = min(self._width(row), known or logits.shape[1])
            if width < logits.shape[1]:
                logits[i, width:] = -torch.inf
        return logits

    def _width(self, row: Row) -> int:
        if self.spec.num_outputs is not None:
            return self.spec.num_outputs
        return self._output.width(row.resident)

    def probe_first_token(self, step: Step, hidden: Sequence[torch.Tensor]) -> None:
        """Find out whether the class reads only the first token, by changing all others: then nothing is padded."""
        if self.spec.task is not Task.CLASSIFY:
            return
        generator = torch.Generator().manual_seed(0)
        changed = [torch.cat([h[:1], torch.randn(h[1:].shape, generator=generator)]) for h in hidden]
        before, after = self.run(step, torch.cat(list(hidden))), self.run(step, torch.cat(changed))
        self._first_token_only = all(torch.equal(b, a) for b, a in zip(before, after, strict=True))

    def _pad(self, batch: Batch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask, hidden) padded on the right to [N, L] and [N, L, d]."""
        ends = batch.cu_seqlens.long()
        starts, counts, longest = ends[:-1, None], ends.diff()[:, None], batch.max_length
        if self.spec.task is Task.GENERATE:  # what follows is read from the last token
            starts, counts, longest = starts + counts - 1, torch.ones_like(counts), 1
        width = 1 if self._first_token_only else longest
        steps = torch.arange(width, device=hidden.device)[None, :]
        index = (starts + torch.minimum(steps, counts - 1)).view(-1)
        mask = (steps < counts).long()
        real = (batch.input_ids[index].view(mask.shape) != batch.pad_ids[:, None]) & (mask == 1)
        return torch.where(real, REAL, PAD), mask, hidden.index_select(0, index).view(*mask.shape, -1)


def head_logits(output: Any) -> torch.Tensor:
    """The logits of any task class: [..., labels], or [..., 2] of an extractive one."""
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


def _head_spec(task: Task, model: nn.Module, prefix: str, leaves: dict[str, nn.Module], missing: set[str]) -> HeadSpec:
    num_outputs = NUM_SPAN_OUTPUTS if task is Task.ANSWER else None
    width = PROBE_LABELS if num_outputs is None else num_outputs
    shapes: dict[str, tuple[int | None, ...]] = {}
    outputs: list[str] = []
    for name, leaf in leaves.items():
        is_output = isinstance(leaf, nn.Linear) and (leaf.out_features == width or task is Task.GENERATE)
        by_label = is_output and num_outputs is None
        if is_output:
            outputs.append(_strip(f"{name}.weight", prefix))
        for part, parameter in leaf.named_parameters():
            rows = None if by_label else parameter.shape[0]
            shapes[_strip(f"{name}.{part}", prefix)] = (rows, *parameter.shape[1:])
    if len(outputs) != 1:
        raise ValueError(f"{type(model).__name__} has {len(outputs)} output layers, one is needed")
    named = {_strip(name, prefix) for name, _ in model.named_parameters()}
    absent = {_strip(name, prefix) for name in missing}
    fixed = named - set(shapes)
    if lacking := fixed & absent:
        raise ValueError(f"{type(model).__name__} needs {sorted(lacking)}, which neither base nor adapters bring")
    generates = task is Task.GENERATE
    from_base = frozenset(
        name for name in shapes if name not in absent and (generates or name.rpartition(".")[0] != _module(outputs[0]))
    )
    return HeadSpec(task, shapes, from_base, frozenset(fixed), "" if generates else outputs[0], num_outputs)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _strip(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.")
