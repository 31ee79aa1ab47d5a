"""The stream of an upload: one header, then bytes, into a folder that nobody sees before it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from lora_runtime.errors import CapacityExceeded, InvalidRequest, MultiloraError
from server.control.uploads import Upload, UploadReceiver
from server.pb.multilora.v1 import adapters_pb2 as pb

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


@asynccontextmanager
async def receive_upload(
    messages: AsyncIterator[pb.UploadAdapterRequest], receiver: UploadReceiver | None, slots: asyncio.Semaphore
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
        if slots.locked():
            raise CapacityExceeded("other uploads are under way; try again in a moment", retry_after_s=2.0)
        async with slots:
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
