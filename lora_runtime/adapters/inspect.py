"""What a folder is, and whether it would be served: every finding at once, without a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.card import CardFiles
from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.header import read_tensor
from lora_runtime.adapters.metadata import MAX_JSON_BYTES
from lora_runtime.adapters.plan import AdapterPlan, ModulePlan, plan_adapter
from lora_runtime.errors import AdapterRejected

_NO_LIMIT = 1 << 62  # bytes: how large the arena is, is the server's affair


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason for which the folder is not served."""

    code: str
    where: str
    message: str  # what is wrong and the remedy


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module that the adapter changes."""

    name: str  # its path in the base
    rank: int | None  # as saved; None where it has no low-rank part
    scaling: float | None
    changes: tuple[str, ...]  # "lora", and what else: "gain", "shift", "params.weight", …


@dataclass(frozen=True, slots=True)
class Inspection:
    """The report on one folder. `digest` is set when the folder is served as it is on `base`."""

    folder: str
    base: str | None  # that it was checked against; None: against none
    task: str | None
    task_type: str | None  # as adapter_config.json says
    base_model_name: str | None  # as the files say: a hint, never compared
    variants: tuple[str, ...]
    labels: tuple[str, ...] | None
    problem_type: str | None
    pooling: str | None
    max_length: int | None
    own_tokenizer: bool
    modules: tuple[ModuleReport, ...]
    head: Mapping[str, tuple[int, ...]]  # parameter → shape
    ignored: tuple[str, ...]  # tensors that change nothing at inference
    num_parameters: int
    num_bytes: int  # of memory once loaded, in float32
    digest: str | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    @property
    def loadable(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdict as `loadable`."""
        return {"loadable": self.loadable, **asdict(self)}


@dataclass(slots=True)
class _Draft:
    plan: AdapterPlan | None = None
    digest: str | None = None
    problems: list[AdapterRejected] = field(default_factory=list[AdapterRejected])
    warnings: list[str] = field(default_factory=list[str])


def inspect_adapter(folder: Path, base: BaseSpec | None) -> Inspection:
    """Examine a folder; against `base` the verdict is that of the server. Never raises for what the folder holds."""
    findings = Findings(collect=True)
    draft = _Draft()
    try:
        draft.plan = plan_adapter(folder, base, findings)
    except AdapterRejected as error:
        draft.problems.append(error)
    except OSError as error:
        name = Path(error.filename).name if error.filename else folder.name
        draft.problems.append(AdapterRejected("FILES_UNREADABLE", name, error.strerror or type(error).__name__))
    draft.problems += findings.problems
    draft.warnings += findings.warnings
    if not draft.problems and draft.plan is not None:
        _read_values(folder, base, draft)
    return _report(folder, base, draft)


def _read_values(folder: Path, base: BaseSpec | None, draft: _Draft) -> None:
    """The last proof: with a base, load it as the server would; without one, look at every value."""
    assert draft.plan is not None
    try:
        if base is not None:
            draft.digest = read_checkpoint(folder, base, _NO_LIMIT).digest
            return
        for name in draft.plan.folder.weights:
            data = draft.plan.folder.read_weights(name)
            for ref in draft.plan.tensors:
                if ref.file == name:
                    read_tensor(ref, data)
    except AdapterRejected as error:
        draft.problems.append(error)


def _report(folder: Path, base: BaseSpec | None, draft: _Draft) -> Inspection:
    plan = draft.plan
    card = plan.card if plan else None
    raw = {} if plan else _raw_config(folder)
    return Inspection(
        folder=folder.name or str(folder),
        base=base.name if base else None,
        task=plan.task.value if plan and plan.task else None,
        task_type=plan.config.task_type if plan else raw.get("task_type"),
        base_model_name=CardFiles(plan.folder, plan.config, plan.metadata).base_model_name if plan else None,
        variants=tuple(variant.name for variant in plan.variants) if plan else (),
        labels=card.labels if card else None,
        problem_type=card.problem_type.value if card else None,
        pooling=card.pooling.value if card and card.pooling else None,
        max_length=card.max_length if card else None,
        own_tokenizer=bool(card and card.tokenizer_sha256),
        modules=tuple(map(_module, plan.modules)) if plan else (),
        head={name: ref.shape for name, ref in plan.head.items()} if plan else {},
        ignored=plan.ignored if plan else (),
        num_parameters=plan.num_parameters if plan else 0,
        num_bytes=(plan.num_bytes if base and not draft.problems else 4 * plan.num_parameters) if plan else 0,
        digest=draft.digest,
        problems=tuple(Problem(error.code, error.where, error.message) for error in draft.problems),
        warnings=tuple(draft.warnings),
    )


def _raw_config(folder: Path) -> dict[str, Any]:
    """Of a folder that is not understood, what its config says all the same; strings only."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_bytes()[:MAX_JSON_BYTES])
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str)} if isinstance(content, dict) else {}


def _module(module: ModulePlan) -> ModuleReport:
    changes = (() if module.rank is None else ("lora",)) + module.extras
    return ModuleReport(module.name, module.rank, None if module.rank is None else module.scaling, changes)
