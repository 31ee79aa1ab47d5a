"""What an adapter answers and how: its task, labels, pooling and tokens, from its JSON files and its head's shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PureWindowsPath

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lora_runtime.adapters.base_spec import BaseSpec, HeadSpec
from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig
from lora_runtime.adapters.folder import BASE_CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from lora_runtime.adapters.header import TensorRef
from lora_runtime.adapters.metadata import (
    LABELLED_TASKS,
    METADATA_FILE,
    AdapterMetadata,
    Label,
    describe_validation,
)
from lora_runtime.adapters.pooling import read_pooling
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterCard, Pooling, ProblemType, Task

TASK_OF_TYPE = {
    "SEQ_CLS": Task.CLASSIFY,
    "TOKEN_CLS": Task.CLASSIFY_TOKENS,
    "QUESTION_ANS": Task.ANSWER,
    "FEATURE_EXTRACTION": Task.EMBED,
    "CAUSAL_LM": Task.GENERATE,
}
_HEADED = (Task.CLASSIFY, Task.CLASSIFY_TOKENS, Task.ANSWER)  # in the order they are tried


class _ModelConfig(BaseModel):
    """What a transformers `config.json` says of a classifier's labels, and of padding."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id2label: dict[int, Label] | None = None
    problem_type: ProblemType | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _labels_are_distinct_rows(self) -> _ModelConfig:
        names = self.id2label or {}
        if sorted(names) != list(range(len(names))):
            raise ValueError("id2label does not number the rows from 0 without a gap")
        if len(set(names.values())) != len(names):
            raise ValueError("id2label names a label twice; each row of the head needs its own")
        return self


@dataclass(frozen=True, slots=True)
class CardFiles:
    """The JSON files that a card is made from."""

    folder: AdapterFolder
    config: LoraConfig
    metadata: AdapterMetadata | None

    @property
    def base_model_name(self) -> str | None:
        """A name on the hub as it is; of a path on the machine that trained the adapter, only the last part."""
        if self.metadata is not None and self.metadata.base_model_name:
            return self.metadata.base_model_name
        name = self.config.base_model_name_or_path
        is_path = name is not None and (name.startswith(("/", "~", ".")) or "\\" in name)
        return PureWindowsPath(name).name if name and is_path else name

    @property
    def labels_are_placeholders(self) -> bool:
        """Whether no file names the labels of a classifier."""
        return self.metadata is None and not self._model_config().id2label

    def task(self, base: BaseSpec, params: Iterable[str]) -> Task:
        """What the adapter answers; `params` are names of parameters saved whole.

        `multilora.json` decides, else the head that the keys hold, else task_type, else what the base is made for.
        """
        task = self._task(base, frozenset(params))
        if task not in base.heads:
            served, why = ", ".join(sorted(base.heads)), base.unserved.get(task)
            reason = f" ({why})" if why else ""
            message = f"the adapter is made to {task}, but {base.name} is served only to {served}{reason}"
            raise AdapterRejected("TASK_UNSUPPORTED", self._task_source, message)
        if self.config.alora_invocation_tokens and task is not Task.GENERATE:
            raise AdapterRejected(
                "TASK_UNSUPPORTED",
                f"{CONFIG_FILE} field alora_invocation_tokens",
                f"PEFT activates aLoRA for CAUSAL_LM alone, so nothing would be adapted to {task}; train plain LoRA",
            )
        return task

    @property
    def _task_source(self) -> str:
        return f"{METADATA_FILE} field task" if self.metadata else f"{CONFIG_FILE} field task_type"

    def _task(self, base: BaseSpec, params: frozenset[str]) -> Task:
        if self.metadata is not None:
            return self.metadata.task
        named = TASK_OF_TYPE.get(self.config.task_type or "")
        held = [task for task in _HEADED if task in base.heads and base.heads[task].output in params]
        one_of_many = named in _HEADED and named in base.unserved  # heads of several tasks share their names
        if held and not one_of_many:
            return named if named is not None and named in held else held[0]
        if named is not None:
            return named
        if self.config.task_type is not None:
            known = ", ".join(TASK_OF_TYPE)
            message = f"is {self.config.task_type!r}; {known} are known here"
            raise AdapterRejected("TASK_UNSUPPORTED", self._task_source, message)
        return Task.GENERATE if base.is_decoder else Task.EMBED

    def guess_task(self, params: Iterable[str]) -> Task | None:
        """The task as far as the files say it without a base."""
        if self.metadata is not None:
            return self.metadata.task
        modules = {name.rpartition(".")[0].rpartition(".")[2] for name in params}
        named = TASK_OF_TYPE.get(self.config.task_type or "")
        if "qa_outputs" in modules:
            return Task.ANSWER
        if modules & {"classifier", "score", "out_proj"} and named not in _HEADED:
            return Task.CLASSIFY
        return named

    def card(self, task: Task, base: BaseSpec, num_labels: int | None) -> AdapterCard:
        """The card, its labels as many as the head has rows; `num_labels` None for a task without a head."""
        model = self._model_config()
        card = AdapterCard(
            task=task,
            labels=None,
            problem_type=ProblemType.SINGLE_LABEL,
            max_length=self.metadata.max_length if self.metadata else None,
            pad_token_id=self._pad_token_id(model, base),
            base_model_name=self.base_model_name,
            metrics=self.metadata.metrics if self.metadata else {},
            invocation_tokens=tuple(self.config.alora_invocation_tokens) or None,
            token_types=self._token_types(),
            prompt=self.metadata.prompt if self.metadata else None,
        )
        if task in LABELLED_TASKS:
            assert num_labels is not None
            card = self._labelled(card, model, num_labels, base.heads[task].output)
        return self._pooled(card, base) if task is Task.EMBED else card

    def _token_types(self) -> bool:
        """PEFT's class for QUESTION_ANS takes token types and does not pass them on (0.21): training saw none."""
        if self.metadata is not None and self.metadata.token_types is not None:
            return self.metadata.token_types
        return self.config.task_type != "QUESTION_ANS"

    def _model_config(self) -> _ModelConfig:
        content = self.folder.read_object(BASE_CONFIG_FILE) or {}
        if self.metadata is not None:
            content = {"pad_token_id": content.get("pad_token_id")}
        if not isinstance(content.get("pad_token_id"), int):  # some models list several
            content = {**content, "pad_token_id": None}
        try:
            return _ModelConfig.model_validate(content)
        except ValidationError as error:
            raise AdapterRejected("CONFIG_INVALID", BASE_CONFIG_FILE, describe_validation(error)) from error

    def _pad_token_id(self, model: _ModelConfig, base: BaseSpec) -> int | None:
        if self.metadata is not None and self.metadata.pad_token_id is not None:
            return self.metadata.pad_token_id
        found = model.pad_token_id
        return found if found is not None and found >= 0 else base.pad_token_id

    def _labelled(self, card: AdapterCard, model: _ModelConfig, num_labels: int, output: str) -> AdapterCard:
        if self.metadata is not None:
            labels, problem = self.metadata.labels, self.metadata.problem_type
        else:
            names = model.id2label
            labels = tuple(names[row] for row in sorted(names)) if names else None
            single = num_labels == 1  # transformers' own default
            problem = model.problem_type or (ProblemType.REGRESSION if single else ProblemType.SINGLE_LABEL)
        if labels is None:
            labels = tuple(f"LABEL_{i}" for i in range(num_labels))
        if len(labels) != num_labels:
            message = f"has {num_labels} rows, but {len(labels)} labels are named; name one for each row"
            raise AdapterRejected("LABELS_MISMATCH", f"{WEIGHTS_FILE} tensor {output}", message)
        return replace(card, labels=labels, problem_type=problem)

    def _pooled(self, card: AdapterCard, base: BaseSpec) -> AdapterCard:
        default = Pooling.LAST if base.is_decoder else Pooling.MEAN
        if self.metadata is not None:
            return replace(card, pooling=self.metadata.pooling or default, normalize=self.metadata.normalize)
        pooling, normalize = read_pooling(self.folder)
        return replace(card, pooling=pooling or default, normalize=normalize)


def count_labels(head: HeadSpec, params: Mapping[str, TensorRef]) -> int | None:
    """The rows of a complete head, None for a task without one; raises AdapterRejected for an incomplete head."""
    if not head.output:
        return None
    for name in head.shapes:
        if name not in params and name not in head.from_base:
            message = f"is missing: the adapter has no {head.task} head; train it with the head in modules_to_save"
            raise AdapterRejected("HEAD_MISSING", f"{WEIGHTS_FILE} tensor {name}", message)
    if head.output not in params:  # the base itself is a fine-tuned classifier; its rows are not this adapter's labels
        message = "is missing, and another model's labels are not used in its place"
        raise AdapterRejected("HEAD_MISSING", f"{WEIGHTS_FILE} tensor {head.output}", message)
    outputs = {name: ref.shape[0] for name, ref in params.items() if head.shapes[name][0] is None}
    rows = {head.output: params[head.output].shape[0]} | outputs
    if len(set(rows.values())) != 1 or not all(rows.values()):
        message = f"disagree on the number of labels: {sorted(set(rows.values()))}"
        raise AdapterRejected("SHAPE_MISMATCH", f"{WEIGHTS_FILE} tensor {', '.join(rows)}", message)
    num_rows = next(iter(rows.values()))
    if head.num_outputs is not None and num_rows != head.num_outputs:
        message = f"has {num_rows} rows, {head.num_outputs} are needed to {head.task}"
        raise AdapterRejected("SHAPE_MISMATCH", f"{WEIGHTS_FILE} tensor {head.output}", message)
    return num_rows
