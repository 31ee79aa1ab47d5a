"""Every error a user, a file or a peer can cause, as one tree.

    MultiloraError
    ├── InvalidRequest            one field of a request is wrong
    │   └── TextTooLong           a text has more tokens than the adapter allows
    ├── AdapterNotFound           no adapter of that name (never answered by the base)
    ├── AdapterAlreadyExists      that tenant/name@version is registered
    ├── AdapterRejected           the adapter's files are refused: what, where, and the remedy
    ├── AdapterFailed             the adapter is registered but its last load was refused
    ├── AdapterInUse              the adapter is pinned, or an alias leads to it: it cannot be unloaded or deleted
    ├── AliasNotFound             the adapter has no alias of that name
    ├── NoPreviousVersion         the alias has not moved, so it cannot be rolled back
    ├── SourceUnavailable         where the adapter's files come from cannot be reached; trying again may help
    ├── LoadCancelled             a load was given up: the adapter was unloaded or deleted, or the engine stops
    ├── TaskMismatch              the adapter answers another task
    ├── AnswerNotFinite           the adapter's weights overflow on this input: no scores follow from that
    ├── BaseModelUnsupported      the base model cannot be served
    ├── CapacityExceeded          no room: a queue or the arena is full; trying again may help
    ├── CheckpointRejected        a model's own files are refused: which file or tensor, why, and the remedy
    ├── TrainingDataInvalid       a training file is refused: which file, which line, and why
    ├── DeadlineExpired           the caller's deadline passed before the answer was ready
    ├── RequestCancelled          the caller went away
    └── EngineStopped             the engine is draining or has stopped

`reason` is a stable upper-case code for machines; the message is for people and names the value, the place
and the remedy. `metadata` carries the same facts as short strings. No error carries the text of a request.
`assert` is for our own bugs and never appears on these paths.
"""

from __future__ import annotations

from pathlib import PurePath

_MAX_CHARS = 2000


def shown(text: str) -> str:
    """`text` fit for a log line and for protobuf: what cannot be printed (lone surrogates too) escaped, and cut."""
    text = text[: _MAX_CHARS + 1]  # enough to see that it is too long
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…"


class MultiloraError(Exception):
    """Base of the tree. `reason` is stable; `metadata` has string values only."""

    reason = "INTERNAL"
    retry_after_s: float | None = None  # a hint, where trying again may help

    def __init__(self, message: str, **metadata: object) -> None:
        self.message = shown(message)
        super().__init__(self.message)
        self.metadata: dict[str, str] = {key: shown(str(value)) for key, value in metadata.items()}


class InvalidRequest(MultiloraError):
    """A field of a request is wrong. `field` is its path, such as ``inputs[3].text``."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str, **metadata: object) -> None:
        super().__init__(f"{field}: {message}", field=field, **metadata)
        self.field = shown(field)
        self.description = shown(message)

    def at(self, field: str) -> InvalidRequest:
        """The same problem, for a caller who knows the field by another name."""
        metadata = {key: value for key, value in self.metadata.items() if key != "field"}
        placed = InvalidRequest(field, self.description, **metadata)
        placed.reason = self.reason
        return placed


class TextTooLong(InvalidRequest):
    """A text has more tokens than the adapter allows, and truncation was not asked for or is none of its options."""

    reason = "TEXT_TOO_LONG"

    def __init__(self, field: str, num_tokens: int, limit: int, *, remedy: str = "shorten it or set truncate") -> None:
        super().__init__(
            field,
            f"has {num_tokens} tokens, the limit is {limit}; {remedy}",
            num_tokens=num_tokens,
            limit=limit,
        )


class AdapterNotFound(MultiloraError):
    """No adapter of that name and version is registered."""

    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, adapter: str) -> None:
        super().__init__(f"adapter {adapter!r} is not registered; register it first or check the name", adapter=adapter)


class AdapterAlreadyExists(MultiloraError):
    """That tenant/name@version is taken; versions are immutable."""

    reason = "ADAPTER_ALREADY_EXISTS"

    def __init__(self, adapter: str) -> None:
        super().__init__(f"adapter {adapter} is already registered; register a new version", adapter=adapter)


class AdapterRejected(MultiloraError):
    """The files of an adapter are refused.

    `where` is the file, or the file and the tensor or field in it; `code` says which rule was broken.
    """

    reason = "ADAPTER_REJECTED"

    def __init__(self, code: str, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}", code=code, where=where)
        self.code = code
        self.where = where


class AdapterFailed(MultiloraError):
    """The adapter is registered, but its last load was refused; `message` repeats why."""

    reason = "ADAPTER_FAILED"

    def __init__(self, adapter: str, cause: MultiloraError) -> None:
        metadata = {**cause.metadata, "adapter": adapter}
        message = f"adapter {adapter} could not be loaded: {cause.message}; mend it and load it again"
        super().__init__(message, **metadata)
        self.cause = cause
        self.retry_after_s = cause.retry_after_s


class AdapterInUse(MultiloraError):
    """The adapter is pinned, or an alias leads to it, so it is not taken away."""

    reason = "ADAPTER_IN_USE"

    def __init__(self, adapter: str, why: str) -> None:
        super().__init__(f"adapter {adapter} {why}", adapter=adapter)


class AliasNotFound(MultiloraError):
    """The adapter is known, but it has no such alias."""

    reason = "ALIAS_NOT_FOUND"

    def __init__(self, alias: str) -> None:
        super().__init__(f"alias {alias} does not exist; set it first or check the name", alias=alias)


class NoPreviousVersion(MultiloraError):
    """An alias cannot be rolled back: it has not moved yet."""

    reason = "NO_PREVIOUS_VERSION"

    def __init__(self, alias: str) -> None:
        super().__init__(f"alias {alias} has not moved, so there is no version to roll it back to", alias=alias)


class SourceUnavailable(MultiloraError):
    """A store cannot be reached."""

    reason = "SOURCE_UNAVAILABLE"

    def __init__(self, url: str, message: str, *, retry_after_s: float = 10.0) -> None:
        super().__init__(f"{url}: {message}", source=url)
        self.retry_after_s = retry_after_s


class LoadCancelled(MultiloraError):
    """The load was given up by an unload, a deletion, or the end of the engine."""

    reason = "LOAD_CANCELLED"

    def __init__(self, adapter: str) -> None:
        super().__init__(f"the load of {adapter} was given up; load it again", adapter=adapter)


class TaskMismatch(MultiloraError):
    """The adapter exists and answers another task than the one asked for."""

    reason = "TASK_MISMATCH"

    def __init__(self, adapter: str, asked: str, answers: str) -> None:
        super().__init__(
            f"adapter {adapter} is made to {answers}, not to {asked}; ask it for what it is made to do",
            adapter=adapter,
            asked=asked,
            answers=answers,
        )


class AnswerNotFinite(MultiloraError):
    """The adapter's logits for one input are NaN or infinite; others of the batch are not touched by that."""

    reason = "ANSWER_NOT_FINITE"

    def __init__(self, adapter: str, index: int) -> None:
        super().__init__(
            f"adapter {adapter} gives logits that are not finite for inputs[{index}]; its weights or its scaling are "
            "too large",
            adapter=adapter,
            index=index,
        )


class BaseModelUnsupported(MultiloraError):
    """The base model cannot be served exactly, so it is not served at all."""

    reason = "BASE_MODEL_UNSUPPORTED"


class CheckpointRejected(MultiloraError):
    """The files of a whole model are refused as the source of an adapter.

    `where` is the folder, the file, or the file and the tensor in it.
    """

    reason = "CHECKPOINT_REJECTED"

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}", where=where)
        self.where = where


class CapacityExceeded(MultiloraError):
    """A bounded resource is full."""

    reason = "CAPACITY_EXCEEDED"

    def __init__(self, message: str, *, retry_after_s: float = 0.1, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after_s = retry_after_s


class TrainingDataInvalid(MultiloraError):
    """A file of training rows is refused; `line` counts from 1, None when no single line is at fault."""

    reason = "TRAINING_DATA_INVALID"

    def __init__(self, path: PurePath, line: int | None, message: str) -> None:
        where = f"{path}" if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {message}", path=path, **({} if line is None else {"line": line}))
        self.path = path
        self.line = line
        self.description = message


class DeadlineExpired(MultiloraError):
    """The deadline passed while the request waited; it was dropped before the forward pass."""

    reason = "DEADLINE_EXPIRED"


class RequestCancelled(MultiloraError):
    """The caller cancelled the request."""

    reason = "REQUEST_CANCELLED"


class EngineStopped(MultiloraError):
    """The engine is draining or has stopped; another replica may answer."""

    reason = "ENGINE_STOPPED"


def first_line(error: Exception) -> str:
    """What a library's error says first, or its type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
