"""Pages of adapters: which come next, and the token that says so."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TypeVar

from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterId, AdapterInfo, AdapterRef
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.rpc.messages import STATES, TASKS

K = TypeVar("K", bound=int)
V = TypeVar("V")

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def list_page(
    catalogue: Catalogue, request: pb.ListAdaptersRequest, tenant: str | None
) -> tuple[list[AdapterInfo], str]:
    """The adapters of one page, and the token of the next, empty on the last; raises InvalidRequest.

    `tenant`: whose, None: everybody's.
    """
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        raise InvalidRequest("page_size", f"{request.page_size} is not between 0 and {MAX_PAGE_SIZE}")
    after = _parse_token(request.page_token, tenant) if request.page_token else None
    size = request.page_size or DEFAULT_PAGE_SIZE
    found = catalogue.list(tenant, after=after, limit=size + 1, matches=_Filter(request))
    return found[:size], _token(found[size - 1].id) if len(found) > size else ""


class _Filter:
    """Whether an adapter is asked for."""

    def __init__(self, request: pb.ListAdaptersRequest) -> None:
        self._prefix = request.name_prefix
        states = {number: state for state, number in STATES.items()}
        tasks = {number: task for task, number in TASKS.items()}
        self._state = _known("state", states, request.state)
        self._task = _known("task", tasks, request.task)

    def __call__(self, info: AdapterInfo) -> bool:
        return (
            info.id.name.startswith(self._prefix)
            and self._state in (None, info.state)
            and (self._task is None or (info.card is not None and info.card.task is self._task))
        )


def _known(field: str, values: Mapping[K, V], number: K) -> V | None:
    if number and number not in values:
        raise InvalidRequest(field, f"{number} is no {field} this server knows")
    return values.get(number)


def _token(last: AdapterId) -> str:
    return base64.urlsafe_b64encode(str(last).encode()).decode()


def _parse_token(token: str, tenant: str | None) -> AdapterId:
    try:
        ref = AdapterRef.parse(base64.b64decode(token, altchars=b"-_", validate=True).decode())
        if ref.version is None or tenant not in (None, ref.tenant):
            raise InvalidRequest("page_token", "is of another list")
        return AdapterId(ref.tenant, ref.name, ref.version)
    except (binascii.Error, ValueError, InvalidRequest) as error:
        raise InvalidRequest("page_token", "is not a next_page_token of this server and these filters") from error
