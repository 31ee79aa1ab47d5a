"""One task's head for every adapter of a batch at once, without per-architecture code.

The head is transformers' own task class with a stub in place of its backbone: the stub hands over hidden states that
are already computed (and the pooler's output, where the backbone has one), and the class does what it always does.
Its linear layers are replaced by `SequenceLinear`, which gives each row its own adapter's parameters, so one call
answers a batch of adapters with different numbers of labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lora_runtime.adapters.base_spec import HeadSpec
from lora_runtime.batch import Batch, Step, current_step
from lora_runtime.heads.sequence_linear import SequenceLinear
from lora_runtime.types import Site, SiteGroup, Task

PROBE_LABELS = 11  # an output width that no hidden size has


class StubBackbone(nn.Module):
    """Answers a task class with given hidden states; keeps the backbone's per-sequence children (its pooler)."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.hidden: torch.Tensor | None = None  # [N, L, d], set around each call

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPooling:
        del args, kwargs
        assert self.hidden is not None
        pooler = self._modules.get("pooler")
        pooled = None if pooler is None else pooler(self.hidden)
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)  # pyright: ignore[reportArgumentType]


class TaskHead:
    """A task class around a stub; `spec` says what parameters an adapter brings."""

    def __init__(self, task: Task, model: nn.Module, prefix: str, children: dict[str, nn.Module], missing: set[str]):
        """`model` is the loaded task class; `missing` are its parameters that the base checkpoint lacks.

        Raises ValueError when the class has no single output layer.
        """
        self._stub = StubBackbone(children)
        setattr(model, prefix, self._stub)
        self._model = model.eval()
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.spec = _head_spec(task, model, prefix, linears, missing)
        self.sequence_linears = {
            _strip(name, prefix): linear for name, linear in linears.items() if f"{name}.weight" not in missing
        }
        self._layers: dict[str, SequenceLinear] = {}
        for name, linear in linears.items():
            own = _strip(name, prefix)
            self._layers[own] = SequenceLinear(own, linear, from_base=f"{own}.weight" in self.spec.from_base)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._layers[own])
        self._first_token_only = False

    def set_sites(self, sites: tuple[Site, ...], groups: tuple[SiteGroup, ...]) -> None:
        """Make the layers that come from the base adaptable by LoRA."""
        for site in sites:
            if site.per_sequence:
                self._layers[site.name].set_site(site, groups[site.group])

    def run(self, step: Step, hidden: torch.Tensor) -> list[torch.Tensor]:
        """hidden [T, d] of the step's batch → per row its logits, [num_labels of its adapter]."""
        batch = step.batch
        input_ids, mask, padded = self._pad(batch, hidden)
        token = current_step.set(step)
        self._stub.hidden = padded
        try:
            logits = self._model(input_ids=input_ids, attention_mask=mask).logits  # [N, widest]
        finally:
            self._stub.hidden = None
            current_step.reset(token)
        widths = [row.params[self.spec.output].shape[0] for row in batch.rows]
        return [logits[i, :width] for i, width in enumerate(widths)]

    def probe_first_token(self, step: Step, hidden: Sequence[torch.Tensor]) -> None:
        """Find out whether the class reads only the first token, by changing all others: then nothing is padded."""
        generator = torch.Generator().manual_seed(0)
        changed = [torch.cat([h[:1], torch.randn(h[1:].shape, generator=generator)]) for h in hidden]
        before, after = self.run(step, torch.cat(list(hidden))), self.run(step, torch.cat(changed))
        self._first_token_only = all(torch.equal(b, a) for b, a in zip(before, after, strict=True))

    def _pad(self, batch: Batch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask, hidden) padded on the right to [N, L] and [N, L, d]."""
        starts = batch.cu_seqlens[:-1].long()[:, None]
        counts = torch.tensor(batch.lengths, device=hidden.device)[:, None]
        width = 1 if self._first_token_only else max(batch.lengths)
        steps = torch.arange(width, device=hidden.device)[None, :]
        index = (starts + torch.minimum(steps, counts - 1)).view(-1)
        mask = (steps < counts).long()
        pad = int(getattr(self._model.config, "pad_token_id", None) or 0)
        input_ids = batch.input_ids[index].view(mask.shape).masked_fill(mask == 0, pad)
        return input_ids, mask, hidden.index_select(0, index).view(*mask.shape, -1)


def _head_spec(task: Task, model: nn.Module, prefix: str, linears: dict[str, nn.Linear], missing: set[str]) -> HeadSpec:
    shapes: dict[str, tuple[int | None, ...]] = {}
    for name, linear in linears.items():
        for part, parameter in linear.named_parameters():
            rows = None if linear.out_features == PROBE_LABELS else linear.out_features
            shapes[_strip(f"{name}.{part}", prefix)] = (rows, *parameter.shape[1:])
    outputs = [name for name, shape in shapes.items() if shape[0] is None and len(shape) == 2]
    if len(outputs) != 1:
        raise ValueError(f"{type(model).__name__} has {len(outputs)} output layers, one is needed")
    named = {_strip(name, prefix) for name, _ in model.named_parameters()}
    absent = {_strip(name, prefix) for name in missing}
    fixed = named - set(shapes)
    if lacking := fixed & absent:
        raise ValueError(f"{type(model).__name__} needs {sorted(lacking)}, which neither base nor adapters bring")
    from_base = frozenset(name for name in shapes if name not in absent and shapes[name][0] is not None)
    return HeadSpec(task, shapes, from_base, frozenset(fixed))


def _strip(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.")
