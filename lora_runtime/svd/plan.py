"""What of a fine-tuned model can become LoRA, what goes with it whole, and what cannot: from names and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from lora_runtime.adapters.base_spec import LeafKind
from lora_runtime.errors import CheckpointRejected, InvalidRequest
from lora_runtime.model.observe import kind_of
from lora_runtime.svd.model_folder import CONFIG_FILE
from lora_runtime.svd.observed import unreachable
from lora_runtime.svd.task_class import TaskClass

_OTHER_BASE = "give the base that the tuning began from"


@dataclass(slots=True)
class ExtractPlan:
    """Modules by what becomes of them if they have changed; paths and names are those of the task class."""

    matrices: dict[str, LeafKind] = field(default_factory=dict[str, LeafKind])  # linear and embedding → LoRA
    replaced: list[str] = field(default_factory=list[str])  # norms and the like → whole
    heads: list[str] = field(default_factory=list[str])  # children of the class beside the backbone → always whole
    fresh: list[str] = field(default_factory=list[str])  # of the backbone, which the base lacks: a pooler → whole
    stuck: dict[str, str] = field(default_factory=dict[str, str])  # parameter → why it cannot be carried
    tied_output: bool = False  # in both models the output layer is the word embedding
    notes: list[str] = field(default_factory=list[str])

    @property
    def num_matrices(self) -> int:
        """How many are decomposed at most."""
        return len(self.matrices)


def plan_extraction(base: TaskClass, tuned: TaskClass) -> ExtractPlan:
    """Compare names, shapes and dtypes; raises CheckpointRejected, naming the tensor, for models that do not match."""
    _check_architecture(base, tuned)
    _check_tuned(tuned)
    _check_base(base, tuned)
    plan = ExtractPlan(tied_output=_is_tied(base) and _is_tied(tuned))
    barred, note = unreachable(tuned)
    plan.notes += [note] if note else []
    for path, leaf in tuned.leaves.items():
        names = [f"{path}.{name}" for name, _ in leaf.named_parameters()]
        if not all(name in tuned.stored for name in names):
            continue  # a pooler that the task does without
        if tuned.inside(path) or path == tuned.output:
            _plan_leaf(plan, base, path, names, kind_of(leaf), barred.get(path))
    plan.heads = [
        name
        for name, child in tuned.model.named_children()
        if tuned.prefix not in ("", name) and name != tuned.output and next(child.parameters(), None) is not None
    ]
    in_leaves = {f"{path}.{name}" for path, leaf in tuned.leaves.items() for name, _ in leaf.named_parameters()}
    for name in sorted(tuned.parameters.keys() - in_leaves):
        if tuned.inside(name) and name in tuned.stored:
            plan.stuck[name] = "is a bare parameter, which no adapter that is served can change"
    if plan.tied_output:
        plan.matrices.pop(tuned.output, None)
    _note_dtypes(plan, base, tuned)
    return plan


def _plan_leaf(
    plan: ExtractPlan, base: TaskClass, path: str, names: list[str], kind: LeafKind, why: str | None
) -> None:
    if any(name not in base.stored for name in names):
        plan.fresh.append(path)
    elif why is not None:
        plan.stuck |= dict.fromkeys(names, why)
    elif kind is LeafKind.OTHER:
        plan.replaced.append(path)
    else:
        plan.matrices[path] = kind


def _is_tied(model: TaskClass) -> bool:
    if not model.output:
        return False
    output, words = (model.stored.get(f"{path}.weight") for path in (model.output, model.word_embedding))
    return output is not None and output == words


def _check_architecture(base: TaskClass, tuned: TaskClass) -> None:
    theirs, ours = base.folder.config, tuned.folder.config
    if type(theirs) is not type(ours):
        where = f"tuned {tuned.folder.path / CONFIG_FILE} field model_type"
        message = f"is {ours.model_type}, the base's is {theirs.model_type}; give the base that the tuning began from"
        raise CheckpointRejected(where, message)


def _check_tuned(tuned: TaskClass) -> None:
    for name, shape in tuned.parameters.items():
        stored = tuned.stored.get(name)
        if stored is None:
            if tuned.is_pooler(name) and tuned.prefix == "":
                continue
            message = f"is missing, and the task {tuned.task} needs it; give the task that the model was tuned for"
            raise CheckpointRejected(f"tuned {tuned.folder.path} tensor {name}", message)
        if not stored.is_floating:
            tuned.folder.reject(stored, f"holds {stored.dtype}, no plain weight; give a model that is not quantised")
        if stored.shape != shape:
            tuned.folder.reject(stored, f"has shape {list(stored.shape)}, its {CONFIG_FILE} says {list(shape)}")


def _check_base(base: TaskClass, tuned: TaskClass) -> None:
    """That both backbones have the same parameters, in the same shapes."""
    for name in sorted(base.parameters.keys() - tuned.parameters.keys()):
        if base.inside(name) and not base.is_pooler(name):
            message = f"is in the base alone; {_OTHER_BASE}"
            raise CheckpointRejected(f"tuned {tuned.folder.path} tensor {name}", message)
    for name in tuned.parameters:
        backbone = tuned.inside(name)
        if (backbone or name.startswith(f"{tuned.output}.")) and name in tuned.stored:
            _check_pair(base, tuned, name, needed=not tuned.is_pooler(name))


def _check_pair(base: TaskClass, tuned: TaskClass, name: str, *, needed: bool) -> None:
    stored, ours = base.stored.get(name), tuned.stored[name]
    if stored is None:
        if needed:
            raise CheckpointRejected(f"base {base.folder.path} tensor {name}", f"is missing; {_OTHER_BASE}")
        return
    if not stored.is_floating:
        base.folder.reject(stored, f"holds {stored.dtype}, no plain weight; give a base that is not quantised")
    if stored.shape != ours.shape:
        _reject_shapes(base, tuned, name)


def _reject_shapes(base: TaskClass, tuned: TaskClass, name: str) -> NoReturn:
    stored, ours = base.stored[name], tuned.stored[name]
    if name.rpartition(".")[0] in (tuned.word_embedding, tuned.output) and stored.shape[1:] == ours.shape[1:]:
        message = (
            f"has {ours.shape[0]} rows, the base {stored.shape[0]}: the vocabulary was resized, which a low-rank "
            "change cannot follow; resize the base's embedding in the same way first, and serve that base"
        )
        tuned.folder.reject(ours, message)
    message = f"has shape {list(ours.shape)}, the base's has {list(stored.shape)}; {_OTHER_BASE}"
    tuned.folder.reject(ours, message)


def _note_dtypes(plan: ExtractPlan, base: TaskClass, tuned: TaskClass) -> None:
    dtypes = [{s.dtype for n, s in model.stored.items() if model.inside(n)} for model in (base, tuned)]
    if dtypes[0] != dtypes[1]:
        theirs, ours = (", ".join(sorted(kinds)) for kinds in dtypes)
        plan.notes.append(f"the base is stored as {theirs}, the tuned model as {ours}: rounding counts as change")


def check_targets(targets: tuple[str, ...], plan: ExtractPlan) -> set[str]:
    """The matrices that the endings name; raises InvalidRequest for one that names none."""
    chosen: set[str] = set()
    for target in targets:
        matched = {path for path in plan.matrices if f".{path}".endswith(f".{target}")}
        if not matched:
            message = f"{target!r} is the ending of no linear layer or embedding; write auto to see all that changed"
            raise InvalidRequest("targets", message)
        chosen |= matched
    return chosen
