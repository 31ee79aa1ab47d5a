"""An adapter's folder on disk: which files count, that they stay inside it, and what they say without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig, read_config
from lora_runtime.adapters.metadata import METADATA_FILE, AdapterMetadata, read_json_object, read_metadata
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterCard, ProblemType, Task

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
BASE_CONFIG_FILE = "config.json"  # some trainers leave the task model's config beside the adapter

TASK_OF_TYPE = {None: Task.CLASSIFY, "SEQ_CLS": Task.CLASSIFY}


def check_folder(folder: Path) -> None:
    """Raise AdapterRejected unless the folder has safetensors weights and no file it needs is a link out of it."""
    if not folder.is_dir():
        raise AdapterRejected("FOLDER_MISSING", folder.name, "is not a folder")
    root = folder.resolve()
    for name in (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, BASE_CONFIG_FILE):
        path = folder / name
        if (path.exists() or path.is_symlink()) and not path.resolve().is_relative_to(root):
            raise AdapterRejected("LINK_OUT_OF_FOLDER", name, "is a link that leaves the folder; copy the file instead")
    if (folder / WEIGHTS_FILE).is_file():
        return
    if (folder / PICKLE_FILE).exists():
        raise AdapterRejected(
            "PICKLE",
            PICKLE_FILE,
            f"is a pickle, which can run code and is never read; save {WEIGHTS_FILE} instead",
        )
    raise AdapterRejected("WEIGHTS_MISSING", WEIGHTS_FILE, "is not in the folder")


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
            base_model_name=metadata.base_model_name or config.base_model_name_or_path,
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
        base_model_name=config.base_model_name_or_path,
    )
    path = folder / BASE_CONFIG_FILE
    return _with_model_config(card, read_json_object(path)) if path.is_file() else card


def complete_card(card: AdapterCard, num_labels: int, where: str) -> AdapterCard:
    """The card with one label per row of the head; raises AdapterRejected when the files name another number."""
    if card.labels is None:
        labels = tuple(f"LABEL_{i}" for i in range(num_labels))
        problem = ProblemType.REGRESSION if num_labels == 1 else card.problem_type
        return replace(card, labels=labels, problem_type=problem)
    if len(card.labels) != num_labels:
        message = f"has {num_labels} rows, but {len(card.labels)} labels are named"
        raise AdapterRejected("LABELS_MISMATCH", where, message)
    return card


def _with_model_config(card: AdapterCard, config: dict[str, object]) -> AdapterCard:
    id2label, problem = config.get("id2label"), config.get("problem_type")
    if isinstance(id2label, dict):
        try:
            names = {int(row): str(name) for row, name in cast("dict[str, object]", id2label).items()}
        except ValueError as error:
            where = f"{BASE_CONFIG_FILE} field id2label"
            raise AdapterRejected("CONFIG_INVALID", where, "has a key that is not a row number") from error
        card = replace(card, labels=tuple(names[row] for row in sorted(names)))
        if len(names) == 1:
            card = replace(card, problem_type=ProblemType.REGRESSION)
    if problem is not None:
        if problem not in set(ProblemType):
            raise AdapterRejected("CONFIG_INVALID", f"{BASE_CONFIG_FILE} field problem_type", f"is {problem!r}")
        card = replace(card, problem_type=ProblemType(str(problem)))
    return card
