"""LoRA from a fully fine-tuned model and its base, one matrix at a time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_runtime.adapters.base_spec import LeafKind
from lora_runtime.adapters.folder import WEIGHTS_FILE
from lora_runtime.adapters.keys import KEY_PREFIX, Part
from lora_runtime.adapters.writing import staged_folder, write_config, write_metadata
from lora_runtime.errors import InvalidRequest
from lora_runtime.svd.described import config_of, copy_tokenizer, metadata_of
from lora_runtime.svd.model_folder import open_model
from lora_runtime.svd.plan import ExtractPlan, check_targets, plan_extraction
from lora_runtime.svd.settings import ExtractSettings, SilentObserver, SvdObserver, torch_threads
from lora_runtime.svd.sites import Carried, NotCarried, SiteReport, Summary, energy_curve, summarize
from lora_runtime.svd.spectrum import decompose, squared_norm
from lora_runtime.svd.task_class import TaskClass, task_of
from lora_runtime.svd.writer import TensorWriter
from lora_runtime.types import Task


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was found, and what the adapter has of it."""

    out: Path
    task: Task
    sites: tuple[SiteReport, ...]  # in the order of the model
    carried: tuple[Carried, ...]
    not_carried: tuple[NotCarried, ...]  # the largest relative change first
    notes: tuple[str, ...]
    summary: Summary
    seconds: float


def extract_adapter(settings: ExtractSettings, observer: SvdObserver | None = None) -> ExtractReport:
    """Write the adapter that turns `settings.base` into `settings.tuned`, as far as the ranks allow.

    Each changed linear layer and embedding gets the truncated SVD of its change, at a scaling of exactly 1. Heads go
    whole, as do changed norms, biases, and embeddings whose factors would be no smaller. What cannot be carried is in
    the report. Memory holds a few copies of the largest matrix, however many there are.

    Raises CheckpointRejected, naming the tensor, for models that do not belong together; InvalidRequest, whose field
    is that of `settings`, for what they do not have. The folder appears complete, or not at all.
    """
    started = time.monotonic()
    with staged_folder(settings.out, overwrite=settings.overwrite) as folder, torch_threads(settings.threads):
        tuned_folder, base_folder = open_model(settings.tuned, "tuned"), open_model(settings.base, "base")
        task = settings.task or task_of(tuned_folder)
        base, tuned = TaskClass.of(base_folder, task), TaskClass.of(tuned_folder, task)
        run = _Extraction(settings, base, tuned, plan_extraction(base, tuned), TensorWriter(folder / WEIGHTS_FILE))
        run.all(observer or SilentObserver())
        num_bytes = run.writer.close()
        write_config(folder, config_of(tuned, base_folder.name, run.ranks, run.whole, run.bias_mode))
        copy_tokenizer(settings.base, settings.tuned, folder)
        write_metadata(folder, metadata_of(base, tuned))
    return ExtractReport(
        settings.out,
        task,
        tuple(run.sites),
        tuple(run.carried),
        tuple(sorted(run.not_carried, key=_by_size)),
        tuple(run.plan.notes),
        summarize(
            tuple(run.sites),
            num_unchanged=run.num_unchanged,
            num_parameters=run.writer.num_parameters,
            num_whole_parameters=run.num_whole_parameters,
            num_bytes=num_bytes,
        ),
        time.monotonic() - started,
    )


@dataclass(slots=True)
class _Extraction:
    """One run: reads a change, writes what becomes of it, and keeps the findings alone."""

    settings: ExtractSettings
    base: TaskClass
    tuned: TaskClass
    plan: ExtractPlan
    writer: TensorWriter
    sites: list[SiteReport] = field(default_factory=list[SiteReport])
    carried: list[Carried] = field(default_factory=list[Carried])
    not_carried: list[NotCarried] = field(default_factory=list[NotCarried])
    ranks: dict[str, int] = field(default_factory=dict[str, int])  # by adapted path
    whole: set[str] = field(default_factory=set[str])  # modules saved whole
    bias_mode: str = "none"
    num_unchanged: int = 0
    num_whole_parameters: int = 0

    def all(self, observer: SvdObserver) -> None:
        """Matrices, then what goes whole, then biases, then what cannot go."""
        chosen = None if self.settings.targets is None else check_targets(self.settings.targets, self.plan)
        observer.on_start(self.plan.num_matrices)
        for path, kind in self.plan.matrices.items():
            observer.on_matrix(path, self._matrix(path, kind, wanted=chosen is None or path in chosen))
        if not self.ranks:
            message = f"no linear layer or embedding that LoRA may change differs from {self.settings.base}"
            raise InvalidRequest("tuned", f"{message}; is it the model that was tuned, and are the targets right?")
        for path in self.plan.heads:
            self._keep_whole(path, "the head, whole")
        for path in self.plan.fresh:
            self._keep_whole(path, "whole: the base has none")
        for path in self.plan.replaced:
            if any(self._changed(f"{path}.{name}") for name in self._parameters_of(path)):
                self._keep_whole(path, "whole")
        self._biases()
        for name, reason in self.plan.stuck.items():
            self._leave(name, reason)
        self._unplaced()

    def _matrix(self, path: str, kind: LeafKind, *, wanted: bool) -> SiteReport | None:
        delta, base_norm = self._delta(f"{path}.weight")
        if not bool(delta.any()):
            self.num_unchanged += 1
            return None
        if not wanted:
            change = _ratio(squared_norm(delta) ** 0.5, base_norm)
            self.not_carried.append(NotCarried(f"{path}.weight", "is none of the targets", change))
            return None
        found = decompose(delta)
        rank = self.settings.ranks.choose(found.spectrum)
        if kind is LeafKind.EMBEDDING and rank * sum(delta.shape) >= delta.numel():
            for module in self._with_tied(path):
                self._keep_whole(module, f"whole: factors of rank {rank} would be no smaller")
            return None
        a, b = found.factors(rank, self.settings.dtype.torch)
        norm = found.spectrum.total**0.5
        report = SiteReport(
            path,
            (delta.shape[0], delta.shape[1]),
            rank,
            found.spectrum.energy(rank),
            found.error(a, b),
            norm,
            _ratio(norm, base_norm),
            energy_at=energy_curve(found.spectrum, rank),
        )
        self._write_factors(path, kind, a, b)
        self.sites.append(report)
        return report

    def _with_tied(self, path: str) -> list[str]:
        """The module, and the output layer where that is the same matrix: PEFT keeps the two apart."""
        both = self.plan.tied_output and path == self.tuned.word_embedding
        return [path, self.tuned.output] if both else [path]

    def _write_factors(self, path: str, kind: LeafKind, a: torch.Tensor, b: torch.Tensor) -> None:
        """`b @ a` is the change of the weight as it is stored."""
        for module in self._with_tied(path):
            self.ranks[module] = a.shape[0]
            is_table = kind is LeafKind.EMBEDDING and module == path
            as_stored = not is_table and not self.tuned.is_conv1d(module)
            own_a, own_b = (a, b) if as_stored else (b.T, a.T)  # a table and a Conv1D are looked at from the other side
            part_a, part_b = (Part.EMBED_A, Part.EMBED_B) if is_table else (Part.A, Part.B)
            self.writer.add(f"{KEY_PREFIX}{module}.{part_a.value}", own_a)
            self.writer.add(f"{KEY_PREFIX}{module}.{part_b.value}", own_b)

    def _keep_whole(self, path: str, how: str) -> None:
        self.whole.add(path)
        total = change = 0.0
        for name in self._parameters_of(path):
            full = f"{path}.{name}"
            value = self.tuned.read(full)
            self._write_whole(full, value)
            if full in self.base.stored and self.base.stored[full].shape == tuple(value.shape):
                delta, norm = self._delta(full)
                change, total = change + squared_norm(delta), total + norm**2
        self.carried.append(Carried(path, how, _ratio(change**0.5, total**0.5)))

    def _write_whole(self, name: str, value: torch.Tensor) -> None:
        self.writer.add(KEY_PREFIX + name, value)
        self.num_whole_parameters += value.numel()

    def _parameters_of(self, path: str) -> list[str]:
        return [name for name, _ in self.tuned.model.get_submodule(path).named_parameters()]

    def _biases(self) -> None:
        """Biases of linear layers: those of adapted ones, or, where another one has changed, all of the model."""
        linear = [path for path, kind in self.plan.matrices.items() if kind is LeafKind.LINEAR]
        if self.plan.tied_output:
            linear.append(self.tuned.output)
        linear = [path for path in linear if path not in self.whole]
        changed = [path for path in linear if self._changed(f"{path}.bias")]
        if not changed:
            return
        self.bias_mode = "lora_only" if all(path in self.ranks for path in changed) else "all"
        for path in linear:
            name = f"{path}.bias"
            adapted = path in self.ranks
            if name in self.tuned.stored and (adapted or self.bias_mode == "all"):
                inner = f"{path}.{Part.BASE_BIAS.value}" if adapted else name
                self._write_whole(inner, self.tuned.read(name))
            if path in changed:
                self.carried.append(Carried(name, "as it is", self._relative(name)))
        if self.bias_mode == "all":
            for path in self.plan.replaced:
                if path not in self.whole and f"{path}.bias" in self.tuned.stored:
                    self._write_whole(f"{path}.bias", self.tuned.read(f"{path}.bias"))

    def _unplaced(self) -> None:
        """Tensors that the task's class has no place for: another task's head, experts that are fused at load."""
        for name, stored in self.tuned.unplaced.items():
            ours = self.base.unplaced.get(name)
            if ours is None or ours.shape != stored.shape:
                reason = f"is no single parameter of {type(self.tuned.model).__name__}, and the base has none like it"
                self.not_carried.append(NotCarried(name, reason))
            else:
                self._leave(name, f"is no single parameter of {type(self.tuned.model).__name__}")

    def _leave(self, name: str, reason: str) -> None:
        delta, norm = self._delta(name)
        if bool(delta.any()):
            self.not_carried.append(NotCarried(name, reason, _ratio(squared_norm(delta) ** 0.5, norm)))

    def _changed(self, name: str) -> bool:
        return name in self.tuned.stored and bool(self._delta(name)[0].any())

    def _relative(self, name: str) -> float | None:
        delta, norm = self._delta(name)
        return _ratio(squared_norm(delta) ** 0.5, norm)

    def _delta(self, name: str) -> tuple[torch.Tensor, float]:
        """(tuned − base in float32, ‖base‖)."""
        delta = self.tuned.read(name).float()
        base = self.base.read(name).float()
        return delta.sub_(base), squared_norm(base) ** 0.5


def _by_size(item: NotCarried) -> float:
    """What the base has none of comes first, then the largest change."""
    return -math.inf if item.relative_change is None else -item.relative_change


def _ratio(change: float, norm: float) -> float | None:
    """None where the base's values are zero: the change has no relative size."""
    return change / norm if norm else None
