"""What a search may vary: named parameters, each with a range or a list of values. No torch here.

learning_rate=1e-4..3e-3:log     a number between two, evenly in its logarithm
dropout=0..0.2                   evenly
rank=4,8,16                      one of these; a single value is fixed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.settings import Init, Optimizer, Schedule, TrainSettings

Value = float | int | str | bool
FIELD = "search_space"  # of the errors raised here
_DIGITS = 3  # significant ones of a drawn number: what a table shows is what was trained with


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def rounded(self, value: float) -> float | int:
        """To few digits, and still inside."""
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values."""

    values: tuple[Value, ...]

    def __str__(self) -> str:
        return ",".join(map(shown_value, self.values))


Space = Mapping[str, Range | Choice]


@dataclass(frozen=True, slots=True)
class _Parameter:
    """`field` is that of TrainSettings; `read` turns text into a value, and raises ValueError."""

    field: str
    read: Callable[[str], Value]
    is_number: bool = False


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _flag(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ValueError
    return text.lower() in ("yes", "true")


def _one_of(kind: type[StrEnum]) -> Callable[[str], Value]:
    return lambda text: str(kind(text))


PARAMETERS: Mapping[str, _Parameter] = {
    "learning_rate": _Parameter("learning_rate", _number, True),
    "rank": _Parameter("rank", int, True),
    "alpha": _Parameter("alpha", _number, True),
    "dropout": _Parameter("dropout", _number, True),
    "rslora": _Parameter("rslora", _flag),
    "dora": _Parameter("dora", _flag),
    "init": _Parameter("init", _one_of(Init)),
    "scheduler": _Parameter("schedule", _one_of(Schedule)),
    "warmup_ratio": _Parameter("warmup_ratio", _number, True),
    "optimizer": _Parameter("optimizer", _one_of(Optimizer)),
    "loraplus_ratio": _Parameter("loraplus_ratio", _number, True),
    "weight_decay": _Parameter("weight_decay", _number, True),
    "loss": _Parameter("loss", str),
    "epochs": _Parameter("epochs", int, True),
    "batch_size": _Parameter("batch_size", int, True),
    "gradient_accumulation": _Parameter("gradient_accumulation", int, True),
}
_ENUMS: Mapping[str, type[StrEnum]] = {"init": Init, "schedule": Schedule, "optimizer": Optimizer}


def default_space(settings: TrainSettings) -> Space:
    """Around what the settings say: the learning rate from a tenth to five times of it, half to twice the batch size.

    The rank is 4, 8, 16 or 32 (alpha follows it unless it is given), the dropout 0, 0.05 or 0.1; epochs stay.
    """
    rate, size = settings.optim.learning_rate, settings.optim.batch_size
    return {
        "learning_rate": Range(rate / 10, rate * 5, log=True),
        "rank": Choice((4, 8, 16, 32)),
        "dropout": Choice((0.0, 0.05, 0.1)),
        "scheduler": Choice(("linear", "cosine", "constant")),
        "batch_size": Choice(tuple(sorted({max(size // 2, 1), size, size * 2}))),
    }


def parse_space(texts: Iterable[str], settings: TrainSettings) -> Space:
    """The default space with `texts` in the place of their parameters, or beside them; raises InvalidRequest."""
    space = dict(default_space(settings))
    given: set[str] = set()
    for text in texts:
        name, sign, values = (part.strip() for part in text.partition("="))
        if not sign or not values:
            raise InvalidRequest(FIELD, f"{text!r} is not NAME=VALUES, such as rank=4,8 or dropout=0..0.2")
        if name not in PARAMETERS:
            raise InvalidRequest(FIELD, f"{name!r} is no parameter that can be searched: {', '.join(PARAMETERS)}")
        if name in given:
            raise InvalidRequest(FIELD, f"{name} is given twice; write one list or range")
        given.add(name)
        space[name] = _parse_values(name, values)
    check_space(space, settings)
    return space


def _parse_values(name: str, text: str) -> Range | Choice:
    parameter = PARAMETERS[name]
    if ".." not in text:
        values = tuple(_read(name, part.strip()) for part in text.split(","))
        if len(set(values)) < len(values):
            raise InvalidRequest(FIELD, f"{name}={text} has a value twice")
        return Choice(values)
    if not parameter.is_number:
        raise InvalidRequest(FIELD, f"{name}={text} is a range; list values, such as {name}={_example(name)}")
    span, colon, form = text.partition(":")
    if colon and form != "log":
        raise InvalidRequest(FIELD, f"{name}={text} ends in {form!r}; only :log may follow a range")
    low, high = (_read(name, part.strip()) for part in span.split("..", 1))
    assert not isinstance(low, str) and not isinstance(high, str)  # of a number's reader
    return Range(low, high, bool(colon), parameter.read is int)


def _read(name: str, text: str) -> Value:
    try:
        return PARAMETERS[name].read(text)
    except ValueError:
        raise InvalidRequest(FIELD, f"{name}: {text!r} is none of its values, such as {_example(name)}") from None


def _example(name: str) -> str:
    parameter = PARAMETERS[name]
    if kind := _ENUMS.get(parameter.field):
        return ",".join(map(str, kind))
    if parameter.read is _flag:
        return "yes,no"
    return {"loss": "cross-entropy,focal"}.get(name, "4,8" if parameter.read is int else "0.1,0.2")


def check_space(space: Space, settings: TrainSettings) -> None:
    """Raise InvalidRequest unless every value of it, taken alone, is one that `settings` can have."""
    if not any(is_searched(values) for values in space.values()):
        raise InvalidRequest(FIELD, "holds one value of each parameter: there is nothing to search")
    for name, values in space.items():
        if name not in PARAMETERS:
            raise InvalidRequest(FIELD, f"{name!r} is no parameter that can be searched: {', '.join(PARAMETERS)}")
        if isinstance(values, Range):
            _check_range(name, values)
        for value in (values.low, values.high) if isinstance(values, Range) else values.values:
            try:
                applied(settings, {name: int(value) if isinstance(values, Range) and values.whole else value})
            except InvalidRequest as error:
                raise InvalidRequest(FIELD, f"{name}={values}: {error.description}") from None


def _check_range(name: str, values: Range) -> None:
    if not values.low < values.high:
        raise InvalidRequest(FIELD, f"{name}={values} does not go from a lower to a higher number")
    if values.log and values.low <= 0:
        raise InvalidRequest(FIELD, f"{name}={values} has no logarithm at {values.low:g}; begin above 0")


def is_searched(values: Range | Choice) -> bool:
    """Whether there is more than one."""
    return isinstance(values, Range) or len(values.values) > 1


def applied(settings: TrainSettings, values: Mapping[str, Value]) -> TrainSettings:
    """The run with these values in it; raises InvalidRequest where they do not go together."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        field = PARAMETERS[name].field
        changes[field] = _ENUMS[field](value) if field in _ENUMS else value
    return settings.changed(**changes)


def shown_value(value: Value) -> str:
    """As it is written on a command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def described(values: Mapping[str, Value], names: Sequence[str] | None = None) -> str:
    """`learning_rate 0.0012  rank 8`, of `names` alone where they are given."""
    return "  ".join(f"{name} {shown_value(value)}" for name, value in values.items() if names is None or name in names)
