"""The server's log: lines for people at a terminal, JSON for machines; a line of a request has its id.

No text of a request and no key reaches it. Our own messages name neither; what libraries raise may quote what they were
given, so where a request is at work a traceback has its places and types, and no message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias

from lora_runtime.errors import MultiloraError
from server.log_repeats import RepeatsFilter

LogFormat: TypeAlias = Literal["auto", "text", "json"]
AccessLog: TypeAlias = Literal["all", "errors", "off"]

request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the RPC that is being answered
access_log = logging.getLogger("server.access")

_FIELDS = "fields"  # the attribute of a record that has more of it than its message
_ENGINE_THREAD = "multilora-engine"
_LIBRARIES = ("asyncio", "grpc", "concurrent")  # their loggers tell of failures inside requests, without their id
_PLAIN = (MultiloraError, OSError, MemoryError)  # whose messages quote no text


def configure(level: str, log_format: LogFormat, access: AccessLog, stream: TextIO | None = None) -> None:
    """Set up the root logger of this process, once."""
    out: TextIO = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(out)
    is_json = log_format == "json" or (log_format == "auto" and not out.isatty())
    handler.setFormatter(JsonFormatter() if is_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # it would print what a record was made of
    logging.getLogger("grpc").setLevel(logging.INFO)  # at debug it writes a line per RPC
    logging.getLogger("lora_runtime.adapters.plan").addFilter(RepeatsFilter())
    configure_access(access)


def configure_access(access: AccessLog) -> None:
    """Which RPCs have a line."""
    access_log.disabled = access == "off"
    access_log.filters = [_only_errors] if access == "errors" else []


def wants_access(code: str) -> bool:
    """Whether an RPC that ended so has a line."""
    return access_log.isEnabledFor(logging.INFO) and (code != "OK" or _only_errors not in access_log.filters)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """`extra` of a log call: what stands beside the message, without what is None or empty."""
    return {_FIELDS: {name: value for name, value in values.items() if value not in (None, "")}}


def log_loop_failure(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: the usual one writes the exception's message, too."""
    logging.getLogger("asyncio").error("%s", context["message"], exc_info=context.get("exception"))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, object] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        if request_id.get():
            line["request_id"] = request_id.get()
        line |= _fields_of(record)
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _shown(record, record.exc_info[1])
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then the rest as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}"
        more = ({"request_id": request_id.get()} if request_id.get() else {}) | dict(_fields_of(record))
        line += "".join(f" {name}={value}" for name, value in more.items())
        if record.exc_info and record.exc_info[1] is not None:
            line += f"\n{_shown(record, record.exc_info[1])}"
        return line


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    return getattr(record, _FIELDS, {})


def _only_errors(record: logging.LogRecord) -> bool:
    return _fields_of(record).get("code") != "OK"


def _shown(record: logging.LogRecord, error: BaseException) -> str:
    in_request = request_id.get() or record.threadName == _ENGINE_THREAD or record.name.partition(".")[0] in _LIBRARIES
    if not in_request:
        return "".join(traceback.format_exception(error)).rstrip()
    return "\n".join(_places(error))


def _places(error: BaseException) -> Iterator[str]:
    """The traceback of an exception and of what led to it, without what they say."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _places(cause)
        yield "which led to:"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    yield f"{type(error).__qualname__}: {error}" if isinstance(error, _PLAIN) else type(error).__qualname__
