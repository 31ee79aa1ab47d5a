"""An adapter's folder on disk: which files count, that they stay inside it, and what they say without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PureWindowsPath

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig, read_config
from lora_runtime.adapters.metadata import (
    METADATA_FILE,
    AdapterMetadata,
    Label,
    describe_validation,
    read_json_object,
    read_metadata,
)
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterCard, ProblemType, Task

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
BASE_CONFIG_FILE = "config.json"  # some trainers leave the task model's config beside the adapter

TASK_OF_TYPE = {None: Task.CLASSIFY, "SEQ_CLS": Task.CLASSIFY}


class _ModelConfig(BaseModel):
    """What a transformers `config.json` says of a classifier's labels."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id2label: dict[int, Label] | None = None
    problem_type: ProblemType | None = None

    @model_validator(mode="after")
    def _labels_are_distinct_rows(self) -> _ModelConfig:
        names = self.id2label or {}
        if sorted(names) != list(range(len(names))):
            raise ValueError("id2label does not number the rows from 0 without a gap")
        if len(set(names.values())) != len(names):
            raise ValueError("id2label names a label twice; each row of the head needs its own")
        return self


def check_folder(folder: Path) -> None:
    """Raise AdapterRejected unless the folder has safetensors weights and the files it needs are files inside it."""
    if not folder.is_dir():
        raise AdapterRejected("FOLDER_MISSING", folder.name, "is not a folder")
    root = folder.resolve()
    for name in (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, BASE_CONFIG_FILE):
        _check_file(folder / name, root)
    if (folder / WEIGHTS_FILE).is_file():
        return
    if (folder / PICKLE_FILE).exists():
        raise AdapterRejected(
            "PICKLE",
            PICKLE_FILE,
            f"is a pickle, which can run code and is never read; save {WEIGHTS_FILE} instead",
        )
    raise AdapterRejected("WEIGHTS_MISSING", WEIGHTS_FILE, "is not in the folder")


def _check_file(path: Path, root: Path) -> None:
    if not (path.exists() or path.is_symlink()):
        return
    try:
        inside = path.resolve().is_relative_to(root)
    except RuntimeError:  # a loop of links
        inside = False
    if not inside:
        message = "is a link that leaves the folder; copy the file instead"
        raise AdapterRejected("LINK_OUT_OF_FOLDER", path.name, message)
    if not path.is_file():  # a pipe would be read for ever
        raise AdapterRejected("NOT_A_FILE", path.name, "is not a regular file")


def read_card(folder: Path) -> AdapterCard:
    """What the JSON files say; raises AdapterRejected when they are missing, invalid or not supported."""
    check_folder(folder)
    return make_card(folder, read_config(folder), read_metadata(folder))


def make_card(folder: Path, config: LoraConfig, metadata: AdapterMetadata | None) -> AdapterCard:
    """`multilora.json` decides, else a `config.json` beside the adapter, else defaults."""
    if metadata is not None:
        return AdapterCard(
            task=metadata.task,
            labels=metadata.labels,
            problem_type=metadata.problem_type,
            max_length=metadata.max_length,
            pad_token_id=metadata.pad_token_id,
            base_model_name=metadata.base_model_name or _base_name(config),
            metrics=metadata.metrics,
        )
    if config.task_type not in TASK_OF_TYPE:
        raise AdapterRejected(
            "TASK_UNSUPPORTED",
            f"{CONFIG_FILE} field task_type",
            f"is {config.task_type!r}; SEQ_CLS is served",
        )
    card = AdapterCard(
        task=TASK_OF_TYPE[config.task_type],
        labels=None,
        problem_type=ProblemType.SINGLE_LABEL,
        max_length=None,
        pad_token_id=None,
        base_model_name=_base_name(config),
    )
    path = folder / BASE_CONFIG_FILE
    return _with_model_config(card, read_json_object(path)) if path.is_file() else card


def _base_name(config: LoraConfig) -> str | None:
    """A name on the hub as it is; of a path on the machine that trained the adapter, only the last part."""
    name = config.base_model_name_or_path
    is_path = name is not None and (name.startswith(("/", "~", ".")) or "\\" in name)
    return PureWindowsPath(name).name if name and is_path else name


def complete_card(card: AdapterCard, num_labels: int, where: str) -> AdapterCard:
    """The card with one label per row of the head; raises AdapterRejected when the files name another number."""
    if card.labels is None:
        labels = tuple(f"LABEL_{i}" for i in range(num_labels))
        plain = num_labels == 1 and card.problem_type is ProblemType.SINGLE_LABEL  # transformers' own default
        problem = ProblemType.REGRESSION if plain else card.problem_type
        return replace(card, labels=labels, problem_type=problem)
    if len(card.labels) != num_labels:
        message = f"has {num_labels} rows, but {len(card.labels)} labels are named"
        raise AdapterRejected("LABELS_MISMATCH", where, message)
    return card


def _with_model_config(card: AdapterCard, content: dict[str, object]) -> AdapterCard:
    try:
        config = _ModelConfig.model_validate(content)
    except ValidationError as error:
        raise AdapterRejected("CONFIG_INVALID", BASE_CONFIG_FILE, describe_validation(error)) from error
    if names := config.id2label:
        card = replace(card, labels=tuple(names[row] for row in sorted(names)))
        if len(names) == 1:
            card = replace(card, problem_type=ProblemType.REGRESSION)
    if config.problem_type is not None:
        card = replace(card, problem_type=config.problem_type)
    return card
