"""The stream of an upload: one header, then bytes, into a folder that nobody sees before it is complete."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from lora_runtime.errors import CapacityExceeded, InvalidRequest, MultiloraError
from server.control.uploads import Upload, UploadReceiver
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.tenancy.model import Principal, Role

MAX_UPLOADS = 4  # at once
MAX_UPLOADS_OF_TENANT = 2
_STALLED_S = 60.0


class UploadsDisabled(MultiloraError):
    """The server keeps no state, so it has no place for files."""

    reason = "UPLOADS_DISABLED"

    def __init__(self) -> None:
        super().__init__("this server has no state directory to keep uploads in; start it with --state")


class UploadStalled(MultiloraError):
    """A client stopped sending in the middle of an upload."""

    reason = "UPLOAD_STALLED"

    def __init__(self) -> None:
        super().__init__(f"no part of the upload came for {_STALLED_S:g} seconds; send it again")


class UploadSlots:
    """How many uploads are received at once, of all and of one tenant. Belongs to the asyncio loop."""

    def __init__(self) -> None:
        self._by_tenant: Counter[str] = Counter()

    @contextmanager
    def hold(self, principal: Principal) -> Generator[None]:
        """A slot for the block; operators may take all of them. Raises CapacityExceeded."""
        tenant = principal.tenant
        if self._by_tenant[tenant] >= MAX_UPLOADS_OF_TENANT and not principal.has(Role.OPERATOR):
            limit = f"{MAX_UPLOADS_OF_TENANT} uploads at once, the limit of a tenant"
            raise CapacityExceeded(f"tenant {tenant} sends {limit}; try again when one is done", retry_after_s=2.0)
        if self._by_tenant.total() >= MAX_UPLOADS:
            message = f"{MAX_UPLOADS} uploads are under way, the server's limit; try again in a moment"
            raise CapacityExceeded(message, retry_after_s=2.0)
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._by_tenant[tenant] -= 1
            self._by_tenant += Counter()  # forgets those that have none


@asynccontextmanager
async def receive_upload(
    messages: AsyncIterator[pb.UploadAdapterRequest],
    receiver: UploadReceiver | None,
    slots: UploadSlots,
    principal: Principal,
) -> AsyncGenerator[tuple[pb.UploadHeader, Callable[[], Awaitable[Upload]]]]:
    """The header, and a call that receives the rest; what is not finished by the end of the block is removed.

    Raises UploadsDisabled, InvalidRequest, CapacityExceeded (too many at once).
    """
    if receiver is None:
        raise UploadsDisabled
    first = await _next(messages)
    if first is None or first.WhichOneof("payload") != "header":
        raise InvalidRequest("header", "is not the first message; send it before the bytes")
    started: list[Upload] = []
    is_over = False  # the caller may be gone before the first file is begun

    async def receive() -> Upload:
        with slots.hold(principal):
            upload = await asyncio.to_thread(receiver.begin, first.header)
            started.append(upload)
            if is_over:
                await asyncio.to_thread(upload.abort)
            while (message := await _next(messages)) is not None:
                if message.WhichOneof("payload") != "data":
                    raise InvalidRequest("data", "is not in a message after the header; send the header once")
                await asyncio.to_thread(upload.write, message.data)
            return upload

    try:
        yield first.header, receive
    finally:
        is_over = True
        for upload in started:
            await asyncio.shield(asyncio.to_thread(upload.abort))


async def _next(messages: AsyncIterator[pb.UploadAdapterRequest]) -> pb.UploadAdapterRequest | None:
    try:
        return await asyncio.wait_for(anext(messages, None), _STALLED_S)
    except TimeoutError as error:
        raise UploadStalled from error
