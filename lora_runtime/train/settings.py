"""What a training run is told, in groups. No torch here.

A value that cannot be used raises InvalidRequest with its field; what depends on the base or the machine is checked
later, by `lora.py`, `placement.py` and the task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.private.settings import Privacy
from lora_runtime.train.tasks.options import ClassifyOptions, TaskOptions

MIN_MAX_LENGTH = 8  # special tokens of a pair and a few of the texts
MAX_RANK = 256


class Schedule(StrEnum):
    """What the learning rate does after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"
    REDUCE_ON_PLATEAU = "reduce-on-plateau"  # halved when the validation loss did not fall in two passes


class Optimizer(StrEnum):
    """What updates the parameters."""

    ADAMW = "adamw"
    ADAM = "adam"  # its weight decay is an L2 penalty on the loss
    LORA_FA = "lora-fa"  # AdamW of B alone, with A frozen (Zhang et al. 2023): PEFT's own


class Init(StrEnum):
    """How A and B begin."""

    DEFAULT = "default"  # A drawn, B zero
    PISSA = "pissa"  # the principal singular vectors of W (Meng et al. 2024)
    OLORA = "olora"  # the QR factors of W (Büyükakyüz 2024)
    EVA = "eva"  # A: the principal directions of the inputs that the training rows cause (Paischer et al. 2024)


# Those that take their beginning out of W, so that A and B as trained do not fit the base any more.
CHANGES_BASE = frozenset({Init.PISSA, Init.OLORA})


class Precision(StrEnum):
    """What the frozen weights and the matrix products are in; what is trained is always fp32."""

    FP32 = "fp32"
    BF16 = "bf16"


class BaseBits(StrEnum):
    """How the frozen weights are kept: bitsandbytes, on CUDA (QLoRA, Dettmers et al. 2023)."""

    NONE = "none"
    INT8 = "8bit"
    NF4 = "4bit"


class DeviceChoice(StrEnum):
    """Where to train."""

    AUTO = "auto"  # CUDA where there is one
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Which rows. The files' form is the task's."""

    train: Path
    valid: Path | None = None
    valid_share: float = 0.1  # of the training rows, when `valid` is None
    max_length: int = 128  # tokens, special ones included

    def __post_init__(self) -> None:
        _require(0 < self.valid_share < 1, "valid_share", self.valid_share, "between 0 and 1")
        _require(self.max_length >= MIN_MAX_LENGTH, "max_length", self.max_length, f"{MIN_MAX_LENGTH} or more")


@dataclass(frozen=True, slots=True)
class LoraChoices:
    """The adapter's form."""

    rank: int = 16
    alpha: float | None = None  # None: twice the rank
    dropout: float = 0.05  # on the input of A
    target_modules: tuple[str, ...] | None = None  # None: every attention and MLP linear of the layers
    rslora: bool = False  # scaling alpha / sqrt(rank) (Kalajdzievski 2023)
    dora: bool = False  # a trained magnitude for each row of W + BA (Liu et al. 2024)
    init: Init = Init.DEFAULT

    def __post_init__(self) -> None:
        # a converted adapter has twice the rank of the one that was trained
        most = MAX_RANK // 2 if self.init in CHANGES_BASE else MAX_RANK
        _require(1 <= self.rank <= most, "rank", self.rank, f"1 to {most}")
        if self.alpha is not None:
            _require(0 < self.alpha < math.inf, "alpha", self.alpha, "greater than 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 up to, not including, 1")
        _require(self.target_modules != (), "target_modules", "empty", "names of linear modules")

    @property
    def lora_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, slots=True)
class Optimisation:
    """How the loss is brought down."""

    learning_rate: float = 1e-3
    schedule: Schedule = Schedule.LINEAR
    warmup_ratio: float = 0.1  # of all steps
    optimizer: Optimizer = Optimizer.ADAMW
    loraplus_ratio: float | None = None  # learning rate of B over that of A (LoRA+, Hayou et al. 2024); None: the same
    weight_decay: float = 0.01
    epochs: int = 10
    batch_size: int = 16  # rows of one forward pass in each process
    gradient_accumulation: int = 1  # forward passes of one step
    gradient_checkpointing: bool = False
    precision: Precision = Precision.FP32
    quantize: BaseBits = BaseBits.NONE
    patience: int | None = None  # validation passes without a better one until the run ends; None: never
    eval_steps: int | None = None  # steps between validation passes; None: an epoch
    loss: str = "cross-entropy"  # see `loss.py`
    device: DeviceChoice = DeviceChoice.AUTO

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "greater than 0")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "0 up to, not including, 1")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        ratio = self.loraplus_ratio
        _require(ratio is None or 1 <= ratio < math.inf, "loraplus_ratio", ratio, "1 or more")
        for name in ("epochs", "batch_size", "gradient_accumulation", "patience", "eval_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")
        if ratio is not None and self.optimizer is Optimizer.LORA_FA:
            raise InvalidRequest(
                "loraplus_ratio", "has no meaning with lora-fa, which freezes A; leave one of them out"
            )


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Where the run writes, and what makes it repeatable."""

    out: Path  # the adapter folder to write
    seed: int = 0
    threads: int | None = None  # of torch on the CPU; None leaves them as they are
    overwrite: bool = False
    resume: bool = False  # go on from the checkpoint of an interrupted run
    keep_checkpoints: bool = True  # beside `out` while the run lasts, so that it can be resumed
    tensorboard: Path | None = None
    report: bool = True  # write report.md and report.png beside the adapter
    base_name: str | None = None  # the hint to write; None: the last part of `base`

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        _require(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")
        if self.resume and not self.keep_checkpoints:
            raise InvalidRequest("resume", "needs the checkpoints that keep_checkpoints has left out")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """One run of `train`."""

    base: str  # a folder, or a name on the hub
    task: TaskOptions
    data: DataFiles
    run: RunSettings
    lora: LoraChoices = field(default_factory=LoraChoices)
    optim: Optimisation = field(default_factory=Optimisation)

    def __post_init__(self) -> None:
        if self.optim.optimizer is Optimizer.LORA_FA and self.lora.dora:
            raise InvalidRequest("optimizer", "lora-fa updates A and B alone, and has no update for DoRA's magnitudes")
        if self.optim.quantize is not BaseBits.NONE and self.lora.init in CHANGES_BASE:
            message = f"{self.lora.init} changes the base's weights, which {self.optim.quantize} has rounded"
            raise InvalidRequest("init", f"{message}; choose default or eva, or keep the base whole")

    @property
    def privacy(self) -> Privacy | None:
        """Of a classifier that is trained privately."""
        return self.task.privacy if isinstance(self.task, ClassifyOptions) else None

    @property
    def base_name(self) -> str:
        """A hub name as it is; of a folder its last part, so that no path of this machine is published."""
        path = Path(self.base)
        return self.run.base_name or (path.resolve().name if path.exists() else self.base)

    def changed(self, **values: Any) -> TrainSettings:
        """The same run with other values, each put into the group whose field it names."""
        own = {name: values.pop(name) for name in ("base", "task", "data", "run", "lora", "optim") if name in values}
        groups = {name: own.get(name, getattr(self, name)) for name in ("task", "data", "run", "lora", "optim")}
        for name, group in groups.items():
            mine = {param.name: values.pop(param.name) for param in fields(group) if param.name in values}
            own[name] = replace(group, **mine) if mine else group
        if values:
            raise InvalidRequest(min(values), "is no setting of training")
        return replace(self, **own)

    def decisive(self) -> Mapping[str, str]:
        """What decides the outcome, by field, as text: two runs that differ here cannot continue one another."""
        ignored = {"out", "overwrite", "resume", "keep_checkpoints", "tensorboard", "threads", "report", "base_name"}
        found = {"base": str(self.base), "kind": type(self.task).__name__}
        for group in (self.task, self.data, self.run, self.lora, self.optim):
            found |= {param.name: str(getattr(group, param.name)) for param in fields(group)}
        return {name: value for name, value in found.items() if name not in ignored}


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidRequest(name, f"is {value}; allowed: {allowed}")
