"""AdapterService: proto ↔ control plane, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import (
    BASE_NAME,
    DEFAULT_ALIAS,
    AdapterId,
    AdapterInfo,
    Alias,
    check_alias_name,
)
from server.backend import completion
from server.control.events import EventLog
from server.control.plane import ControlPlane, Deleted, Once
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.pb.multilora.v1 import adapters_pb2_grpc
from server.rpc.caller import (
    aim_alias,
    aim_at,
    caller,
    check_own,
    parse_adapter,
    parse_reference,
    require,
    resolve,
    resolve_own,
    tenant_filter,
)
from server.rpc.context import Context
from server.rpc.listing import list_page
from server.rpc.messages import adapter_message, alias_message, change_message
from server.rpc.uploading import UploadSlots, receive_upload
from server.tenancy.model import Role

_MAX_VERSION = 999_999_999  # nine digits, what a reference can spell
_SNAPSHOT_PAGE = 200


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The control plane over gRPC; the adapter root and the allowed URLs are all that callers can name."""

    def __init__(self, plane: ControlPlane, events: EventLog) -> None:
        self._plane = plane
        self._events = events
        self._slots = UploadSlots()

    async def RegisterAdapter(  # noqa: N802 - the proto's name
        self, request: pb.RegisterAdapterRequest, context: Context
    ) -> pb.RegisterAdapterResponse:
        del context
        require(Role.ADAPTERS)
        tenant, name, version = named_version(request, "")

        async def change(once: Once) -> pb.RegisterAdapterResponse:
            return await self._plane.register_folder(
                tenant, name, version, await self._origin(request.source), self._registered, once
            )

        reply = await self._plane.once(
            tenant, "RegisterAdapter", request, request.request_id, pb.RegisterAdapterResponse, change
        )
        aim_at(reply.adapter.name)
        return reply

    async def UploadAdapter(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        del context
        principal = require(Role.ADAPTERS)
        async with receive_upload(request_iterator, self._plane.uploads, self._slots, principal) as (header, received):
            tenant, name, version = named_version(header, "header.")

            async def change(once: Once) -> pb.UploadAdapterResponse:
                self._plane.check_new(tenant, name, version)
                upload = await received()
                return await self._plane.register_upload(tenant, name, version, upload, self._uploaded, once)

            with _request_id_of_header():
                reply = await self._plane.once(
                    tenant, "UploadAdapter", header, header.request_id, pb.UploadAdapterResponse, change
                )
            aim_at(reply.adapter.name)
            return reply

    async def GetAdapter(  # noqa: N802
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        del context
        require(Role.INFER, Role.ADAPTERS)
        info = resolve(self._catalogue, request.adapter)
        aliases = self._catalogue.aliases(info.id.tenant, info.id.name)
        return pb.GetAdapterResponse(adapter=self._message(info), aliases=map(alias_message, aliases))

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        del context
        require(Role.INFER, Role.ADAPTERS)
        page, token = list_page(self._catalogue, request, tenant_filter(request.tenant))
        return pb.ListAdaptersResponse(adapters=map(self._message, page), next_page_token=token)

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        del context
        require(Role.ADAPTERS)
        info = resolve_own(self._catalogue, request.adapter)
        # a failure that nobody waits for is kept in the adapter's state, where GetAdapter shows it
        loading = self._plane.engine.load(info.id)
        info = await completion(loading) if request.wait else self._catalogue.get(info.id)
        return pb.LoadAdapterResponse(adapter=self._message(info))

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        del context
        require(Role.ADAPTERS)
        info = resolve_own(self._catalogue, request.adapter)
        unloaded = await completion(self._plane.engine.unload(info.id))
        return pb.UnloadAdapterResponse(
            adapter=self._message(unloaded.info),
            freed_bytes=unloaded.freed_bytes,
            freed_host_bytes=unloaded.freed_host_bytes,
        )

    async def PinAdapter(  # noqa: N802
        self, request: pb.PinAdapterRequest, context: Context
    ) -> pb.PinAdapterResponse:
        del context
        require(Role.ADAPTERS)
        ref = parse_reference(request.adapter)
        check_own(ref.tenant, str(ref))
        tenant = ref.tenant

        async def change(once: Once) -> pb.PinAdapterResponse:
            adapter = resolve_own(self._catalogue, request.adapter).id
            return await self._plane.pin(
                adapter, request.pinned, lambda info: pb.PinAdapterResponse(adapter=self._message(info)), once
            )

        return await self._plane.once(tenant, "PinAdapter", request, request.request_id, pb.PinAdapterResponse, change)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:  # noqa: N802
        del context
        require(Role.ADAPTERS)
        tenant, name = parse_adapter("adapter", request.adapter)
        if request.alias != DEFAULT_ALIAS:
            check_alias_name("alias", request.alias)
        aim_at(f"tenants/{tenant}/adapters/{name}/aliases/{request.alias}")
        wanted = None if request.rollback else _wanted_alias(request, tenant, name)
        if request.rollback and (request.version or request.canary_version or request.canary_percent):
            raise InvalidRequest("rollback", "leads back to the version before; name no other with it")
        if wanted is not None:
            aim_alias(wanted.version, wanted.canary_version or 0, wanted.canary_percent)

        def reply(alias: Alias) -> pb.SetAliasResponse:
            return pb.SetAliasResponse(alias=alias_message(alias))

        async def change(once: Once) -> pb.SetAliasResponse:
            if wanted is None:
                return await self._plane.roll_back(tenant, name, request.alias, reply, once)
            return await self._plane.set_alias(wanted, reply, once)

        answer = await self._plane.once(tenant, "SetAlias", request, request.request_id, pb.SetAliasResponse, change)
        aim_alias(answer.alias.version, answer.alias.canary_version, answer.alias.canary_percent)
        return answer

    async def DeleteAlias(  # noqa: N802
        self, request: pb.DeleteAliasRequest, context: Context
    ) -> pb.DeleteAliasResponse:
        del context
        require(Role.ADAPTERS)
        tenant, name = parse_adapter("adapter", request.adapter)
        check_alias_name("alias", request.alias)
        aim_at(f"tenants/{tenant}/adapters/{name}/aliases/{request.alias}")

        async def change(once: Once) -> pb.DeleteAliasResponse:
            return await self._plane.delete_alias(tenant, name, request.alias, pb.DeleteAliasResponse(), once)

        return await self._plane.once(
            tenant, "DeleteAlias", request, request.request_id, pb.DeleteAliasResponse, change
        )

    async def DeleteAdapter(  # noqa: N802
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        del context
        require(Role.ADAPTERS)
        ref = parse_reference(request.adapter)
        if ref.version is None:
            raise InvalidRequest("adapter", f"{ref} names no version; say which one is to be deleted")
        if ref.name == BASE_NAME:
            raise InvalidRequest("adapter", "the base model cannot be deleted")
        check_own(ref.tenant, str(ref))
        adapter = AdapterId(ref.tenant, ref.name, ref.version)

        async def change(once: Once) -> pb.DeleteAdapterResponse:
            return await self._plane.delete(adapter, _deleted, once)

        return await self._plane.once(
            adapter.tenant, "DeleteAdapter", request, request.request_id, pb.DeleteAdapterResponse, change
        )

    async def WatchAdapters(  # noqa: N802
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        del context
        require(Role.INFER, Role.ADAPTERS)
        tenant = tenant_filter(request.tenant)
        catalogue = self._catalogue
        after = self._events.after(request.resume_token) if request.resume_token else None
        if after is None:
            after = self._events.latest
            last: AdapterId | None = None
            while page := catalogue.list(tenant, after=last, limit=_SNAPSHOT_PAGE):
                for info in page:
                    yield pb.WatchAdaptersResponse(adapter=self._message(info))
                last = page[-1].id
            for alias in catalogue.aliases(tenant):
                yield pb.WatchAdaptersResponse(alias=alias_message(alias))
            yield pb.WatchAdaptersResponse(snapshot_complete=True, resume_token=self._events.token_of(after))
        async with contextlib.aclosing(self._events.follow(after, tenant)) as changes:
            async for sequence, event in changes:
                yield change_message(event, self._message, self._events.token_of(sequence))

    @property
    def _catalogue(self) -> Catalogue:
        return self._plane.engine.catalogue

    async def _origin(self, source: str) -> Origin:
        principal = caller()
        if "://" in source:
            return await self._plane.resolve_url(source, principal.tenant)
        owner = None if principal.has(Role.OPERATOR) else principal.tenant
        return Origin(str(await asyncio.to_thread(self._plane.places.folder, source, owner)))

    def _message(self, info: AdapterInfo) -> pb.Adapter:
        return adapter_message(info, self._plane.places.shown(info), self._catalogue.aliases_of(info.id))

    def _registered(self, info: AdapterInfo) -> pb.RegisterAdapterResponse:
        return pb.RegisterAdapterResponse(adapter=self._message(info))

    def _uploaded(self, info: AdapterInfo) -> pb.UploadAdapterResponse:
        return pb.UploadAdapterResponse(adapter=self._message(info))


def named_version(request: pb.RegisterAdapterRequest | pb.UploadHeader, prefix: str) -> tuple[str, str, int | None]:
    """Tenant, name and version of what is to be registered; raises InvalidRequest on a field below `prefix`."""
    tenant, name = parse_adapter(f"{prefix}name", request.name)
    if not request.HasField("version"):
        return tenant, name, None
    if not 1 <= request.version <= _MAX_VERSION:
        raise InvalidRequest(f"{prefix}version", f"{request.version} is not between 1 and {_MAX_VERSION}")
    return tenant, name, request.version


@contextlib.contextmanager
def _request_id_of_header() -> Generator[None]:
    """What is wrong with the request id of an upload is named by its place, the header."""
    try:
        yield
    except InvalidRequest as error:
        if error.field != "request_id":
            raise
        raise error.at("header.request_id") from error


def _wanted_alias(request: pb.SetAliasRequest, tenant: str, name: str) -> Alias:
    if not 1 <= request.version <= _MAX_VERSION:
        raise InvalidRequest("version", f"{request.version} is not between 1 and {_MAX_VERSION}")
    if request.canary_percent and not request.canary_version:
        raise InvalidRequest("canary_version", "is not given, but a percentage for it is")
    if not 0 <= request.canary_version <= _MAX_VERSION:
        raise InvalidRequest("canary_version", f"{request.canary_version} is not between 1 and {_MAX_VERSION}")
    canary = request.canary_version or None
    return Alias(tenant, name, request.alias, request.version, canary, request.canary_percent if canary else 0.0)


def _deleted(deleted: Deleted) -> pb.DeleteAdapterResponse:
    return pb.DeleteAdapterResponse(
        freed_bytes=deleted.unloaded.freed_bytes,
        freed_host_bytes=deleted.unloaded.freed_host_bytes,
        freed_disk_bytes=deleted.disk_bytes,
    )
