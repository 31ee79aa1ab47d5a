"""AdapterService: register, load, unload, look up and list adapters."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import BASE_NAME, DEFAULT_TENANT, AdapterId, AdapterInfo, AdapterRef, check_name
from server.backend import BackendSlot, Catalogue, Engine, completion
from server.pb.multilora.v1 import adapters_pb2, adapters_pb2_grpc
from server.rpc.context import Context
from server.rpc.messages import adapter_message

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_MAX_VERSION = 999_999_999  # nine digits, what a reference can spell


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The catalogue over gRPC; `adapter_root` is the only place on disk that callers can name."""

    def __init__(self, slot: BackendSlot, adapter_root: Path) -> None:
        self._slot = slot
        self._root = adapter_root.resolve()
        self._registering = asyncio.Lock()  # choosing the next version and taking it are one step

    async def RegisterAdapter(  # noqa: N802 - the proto's name
        self,
        request: adapters_pb2.RegisterAdapterRequest,
        context: Context,  # noqa: ARG002
    ) -> adapters_pb2.RegisterAdapterResponse:
        engine = self._slot.get().engine
        _check_adapter_name(request.name)
        if request.HasField("version") and not 1 <= request.version <= _MAX_VERSION:
            raise InvalidRequest("version", f"{request.version} is not between 1 and {_MAX_VERSION}")
        path = await asyncio.to_thread(source_folder, self._root, request.source)
        async with self._registering:
            version = request.version if request.HasField("version") else _next_version(engine, request.name)
            adapter = AdapterId(DEFAULT_TENANT, request.name, version)
            info = await completion(engine.register(adapter, path))
        return adapters_pb2.RegisterAdapterResponse(adapter=adapter_message(info))

    async def LoadAdapter(  # noqa: N802
        self,
        request: adapters_pb2.LoadAdapterRequest,
        context: Context,  # noqa: ARG002
    ) -> adapters_pb2.LoadAdapterResponse:
        engine = self._slot.get().engine
        info = resolve(engine.catalogue, request.adapter)
        # a failure that nobody waits for is kept in the adapter's state, where GetAdapter shows it
        loading = engine.load(info.id)
        info = await completion(loading) if request.wait else resolve(engine.catalogue, info.id.resource_name)
        return adapters_pb2.LoadAdapterResponse(adapter=adapter_message(info))

    async def UnloadAdapter(  # noqa: N802
        self,
        request: adapters_pb2.UnloadAdapterRequest,
        context: Context,  # noqa: ARG002
    ) -> adapters_pb2.UnloadAdapterResponse:
        engine = self._slot.get().engine
        info = resolve(engine.catalogue, request.adapter)
        unloaded = await completion(engine.unload(info.id))
        return adapters_pb2.UnloadAdapterResponse(
            adapter=adapter_message(unloaded.info), freed_bytes=unloaded.freed_bytes
        )

    async def GetAdapter(  # noqa: N802
        self,
        request: adapters_pb2.GetAdapterRequest,
        context: Context,  # noqa: ARG002
    ) -> adapters_pb2.GetAdapterResponse:
        info = resolve(self._slot.get().engine.catalogue, request.adapter)
        return adapters_pb2.GetAdapterResponse(adapter=adapter_message(info))

    async def ListAdapters(  # noqa: N802
        self,
        request: adapters_pb2.ListAdaptersRequest,
        context: Context,  # noqa: ARG002
    ) -> adapters_pb2.ListAdaptersResponse:
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise InvalidRequest("page_size", f"{request.page_size} is not between 0 and {MAX_PAGE_SIZE}")
        after = _parse_page_token(request.page_token) if request.page_token else None
        adapters = self._slot.get().engine.catalogue.list(DEFAULT_TENANT)
        page, more = _page(adapters, after, request.page_size or DEFAULT_PAGE_SIZE)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[adapter_message(info) for info in page],
            next_page_token=_page_token(page[-1].id) if more else "",
        )


def resolve(catalogue: Catalogue, reference: str) -> AdapterInfo:
    """The adapter a request names; raises InvalidRequest on field `adapter`, or AdapterNotFound."""
    if not reference:
        raise InvalidRequest("adapter", "is empty; name the adapter")
    return catalogue.resolve(AdapterRef.parse(reference))


def source_folder(root: Path, source: str) -> Path:
    """The folder `source` names below `root` (resolved); raises InvalidRequest on field `source`.

    Nothing outside the root is read or revealed: `..`, absolute paths and links that lead out are refused
    before the file system is asked whether they exist.
    """
    parts = PurePosixPath(source)
    if not source or "\0" in source or parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InvalidRequest(
            "source", f"{source[:200]!r} is not a relative path; name a folder under the server's adapter root"
        )
    try:
        folder = (root / parts).resolve()
        inside = folder.is_relative_to(root) and folder != root
        found = inside and folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise InvalidRequest(
            "source", f"{source[:200]!r} is not a readable folder under the server's adapter root"
        ) from error
    if not inside:
        raise InvalidRequest(
            "source", f"{source[:200]!r} leads out of the server's adapter root; copy the folder into it"
        )
    if not found:
        raise InvalidRequest(
            "source", f"{source[:200]!r} is not a folder under the server's adapter root; put the adapter there first"
        )
    return folder


def _check_adapter_name(name: str) -> None:
    check_name("name", name)
    if name == BASE_NAME:
        raise InvalidRequest("name", f"{BASE_NAME!r} is reserved for the base model")


def _next_version(engine: Engine, name: str) -> int:
    return max(engine.catalogue.versions(DEFAULT_TENANT, name), default=0) + 1


def _page(adapters: Sequence[AdapterInfo], after: AdapterId | None, size: int) -> tuple[Sequence[AdapterInfo], bool]:
    """The `size` adapters that follow `after`, and whether there are more."""
    rest = adapters if after is None else [info for info in adapters if info.id > after]
    return rest[:size], len(rest) > size


def _page_token(last: AdapterId) -> str:
    return base64.urlsafe_b64encode(f"{last.name}@{last.version}".encode()).decode()


def _parse_page_token(token: str) -> AdapterId:
    try:
        ref = AdapterRef.parse(base64.b64decode(token, altchars=b"-_", validate=True).decode())
        if ref.version is None:
            raise InvalidRequest("page_token", "names no version")
        return AdapterId(DEFAULT_TENANT, ref.name, ref.version)
    except (binascii.Error, ValueError, InvalidRequest) as error:
        raise InvalidRequest("page_token", "is not a next_page_token of this server") from error
