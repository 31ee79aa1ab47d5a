"""What goes wrong at a store, as errors of the tree.

The libraries' own texts are left out and their exceptions not chained: they can hold signed URLs and tokens.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from lora_runtime.adapters.sources.urls import shown_url
from lora_runtime.errors import AdapterRejected, MultiloraError, SourceUnavailable

_RETRYABLE = {408, 425, 429}
_OFFLINE = {"OfflineModeIsEnabled"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}
_WIRE = ("aiohttp", "httpx", "httpx2", "httpcore", "requests", "urllib3", "gcsfs")
_BOTO_WIRE = {
    "HTTPClientError",
    "ConnectionError",
    "IncompleteReadError",
    "ChecksumError",
}  # others are of its settings


@contextmanager
def at_store(url: str) -> Generator[None]:
    """Around calls of a store's library, and of nothing else: every exception is taken for the store's."""
    try:
        yield
    except MultiloraError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a library that writes by itself: not the store's fault
        raise as_error(url, error) from None


def as_error(url: str, error: Exception) -> MultiloraError:
    """The error of the tree that says the same: SourceUnavailable where trying again may help."""
    where = shown_url(url)
    chain = list(_chain(error))
    if status := next((status for status in map(_status, chain) if status), None):
        return _of_status(where, status)
    names = {type(link).__name__ for link in chain}
    if names & _OFFLINE:
        return AdapterRejected("SOURCE_UNSUPPORTED", where, "cannot be asked: HF_HUB_OFFLINE is set; unset it")
    if names & _NO_CREDENTIALS or any(isinstance(link, PermissionError) for link in chain):
        return _forbidden(where)
    for link in reversed(chain):  # the first cause: fsspec reports a lost connection as a file that is not there
        if isinstance(link, FileNotFoundError):
            return AdapterRejected("SOURCE_MISSING", where, "is not there; check the URL")
        if isinstance(link, (OSError, TimeoutError)) or _is_of_the_wire(link):
            return SourceUnavailable(where, f"cannot be reached ({type(link).__name__})")
    return AdapterRejected("SOURCE_INVALID", where, f"cannot be read ({type(error).__name__}); check the URL")


def unsupported(url: str, scheme: str) -> AdapterRejected:
    """The package that reads this scheme is not installed, or there is none."""
    extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}.get(scheme)
    remedy = f"pip install 'multilora[{extra}]'" if extra else "use one that fsspec knows, with its package installed"
    return AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), f"{scheme}:// cannot be read here; {remedy}")


def _of_status(where: str, status: int) -> MultiloraError:
    if status in (401, 403):
        return _forbidden(where)
    if status in (404, 410):
        return AdapterRejected("SOURCE_MISSING", where, "is not there; check the URL")
    if status == 412:
        return AdapterRejected("SOURCE_CHANGED", where, "changed while it was read; register it again")
    if status >= 500 or status in _RETRYABLE:
        return SourceUnavailable(where, f"answered {status}")
    return AdapterRejected("SOURCE_INVALID", where, f"answered {status}; check the URL")


def _forbidden(where: str) -> AdapterRejected:
    return AdapterRejected(
        "SOURCE_FORBIDDEN", where, "may not be read, or is not there; check the credentials in the environment"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    for _ in range(20):  # a chain can loop
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_the_wire(error: BaseException) -> bool:
    package = type(error).__module__.partition(".")[0]
    if package in ("botocore", "aiobotocore"):
        return any(kind.__name__ in _BOTO_WIRE for kind in type(error).__mro__)
    return package in _WIRE


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error of aiohttp, botocore, gcsfs or huggingface_hub."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    elif type(error).__module__.startswith("gcsfs"):
        found = getattr(
            error, "code", None
        )  # elsewhere `code` is set without an answer: aiohttp's, of a cut connection
    else:
        found = getattr(error, "status", None)
    try:
        return int(found) if found is not None and 400 <= int(found) < 600 else None
    except (TypeError, ValueError):
        return None
