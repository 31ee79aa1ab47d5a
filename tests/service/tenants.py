"""Callers of several tenants: an auth file with keys, and clients that show them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.pb.multilora.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from server.tenancy.identity import Identity
from server.tenancy.keys import KeyStore, utc_now
from server.tenancy.model import Role
from tests.service.harness import Harness, running

INFERENCE = ("Classify", "ClassifyTokens", "AnswerQuestion", "Embed", "Generate", "GenerateStream", "Translate")
CHANGES = (
    "RegisterAdapter", "UploadAdapter", "LoadAdapter", "UnloadAdapter", "PinAdapter", "SetAlias", "DeleteAlias",
    "DeleteAdapter",
)  # fmt: skip
READS = ("GetAdapter", "ListAdapters", "WatchAdapters")
STREAMS = ("WatchAdapters", "GenerateStream")
METHODS = (*INFERENCE, *CHANGES, *READS, "GetUsage")


class Caller:
    """One credential, over one channel."""

    def __init__(self, channel: aio.Channel, *authorization: str) -> None:
        self.metadata = tuple(("authorization", value) for value in authorization)
        self._stubs: tuple[Any, ...] = (
            inference_pb2_grpc.InferenceServiceStub(channel),
            adapters_pb2_grpc.AdapterServiceStub(channel),
            usage_pb2_grpc.UsageServiceStub(channel),
        )

    def start(self, method: str, request: Any, **options: Any) -> Any:
        """The call itself; a list of messages for UploadAdapter."""
        stub = next(stub for stub in self._stubs if hasattr(stub, method))
        return getattr(stub, method)(request, metadata=self.metadata, **options)

    def __call__(self, method: str, request: Any, **options: Any) -> Any:
        """The reply, or the first one of a stream; to be awaited."""
        call = self.start(method, request, **options)
        return call.read() if method in STREAMS else call


def request_for(method: str, adapter: str = "news", **fields: Any) -> Any:
    """A request of any method that is right but for what it names."""
    texts = [inference_pb2.TextInput(text="x")]
    match method:
        case "Classify" | "ClassifyTokens" | "Embed" | "Translate":
            return getattr(inference_pb2, f"{method}Request")(adapter=adapter, inputs=texts, **fields)
        case "AnswerQuestion":
            inputs = [inference_pb2.QuestionInput(question="x", context="y")]
            return inference_pb2.AnswerQuestionRequest(adapter=adapter, inputs=inputs, **fields)
        case "Generate" | "GenerateStream":
            prompts = [inference_pb2.PromptInput(text="x")]
            return inference_pb2.GenerateRequest(adapter=adapter, inputs=prompts, **fields)
        case "UploadAdapter":
            file = adapters_pb2.UploadFile(path="adapter_config.json", num_bytes=0, sha256="0" * 64)
            header = adapters_pb2.UploadHeader(name=adapter, files=[file], **fields)
            return [adapters_pb2.UploadAdapterRequest(header=header)]
        case "RegisterAdapter":
            return adapters_pb2.RegisterAdapterRequest(**{"name": adapter, "source": "nowhere"} | fields)
        case "SetAlias":
            return adapters_pb2.SetAliasRequest(**{"adapter": adapter, "alias": "prod", "version": 1} | fields)
        case "DeleteAlias":
            return adapters_pb2.DeleteAliasRequest(**{"adapter": adapter, "alias": "prod"} | fields)
        case "ListAdapters" | "WatchAdapters":
            return getattr(adapters_pb2, f"{method}Request")(**fields)
        case "GetUsage":
            return usage_pb2.GetUsageRequest(**fields)
        case _:
            return getattr(adapters_pb2, f"{method}Request")(adapter=adapter, **fields)


@dataclass
class Door:
    """The files that say who may come in."""

    folder: Path

    @property
    def auth(self) -> Path:
        return self.folder / "auth.toml"

    @property
    def keys(self) -> KeyStore:
        return KeyStore(self.folder / "keys.json")

    def key(self, tenant: str, *roles: Role, **more: Any) -> str:
        """The Authorization header of a new key."""
        return f"Bearer {self.keys.create(tenant, roles or [Role.INFER], utc_now(), **more)[0]}"

    def write(self, *tables: str) -> None:
        """An auth file with API keys, and these tables."""
        self.auth.write_text("\n".join(('[keys]\nfile = "keys.json"', *tables)))


def make_door(folder: Path, *tables: str) -> Door:
    folder.mkdir(exist_ok=True)
    door = Door(folder)
    door.key("nobody")  # the file of keys must be there when the server starts
    door.write(*tables)
    return door


@asynccontextmanager
async def guarded(
    root: Path, door: Door, keys: Iterable[tuple[str, str, tuple[Role, ...]]], **settings: Any
) -> AsyncGenerator[tuple[Harness, dict[str, Caller]]]:
    """A server that asks for keys, and callers by name: (name, tenant, roles)."""
    headers = {name: door.key(tenant, *roles) for name, tenant, roles in keys}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Identity.run, "__defaults__", (0.02,))
        async with running(root, auth=door.auth, **settings) as server:
            yield server, {name: Caller(server.channel, header) for name, header in headers.items()}


async def code_of(call: Any) -> grpc.StatusCode:
    """How a call ends; a stream's first message is enough."""
    try:
        await call
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def reflection_code(channel: aio.Channel, *headers: str) -> grpc.StatusCode:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    call = stub.ServerReflectionInfo(requests, metadata=tuple(("authorization", header) for header in headers))
    code = await code_of(call.read())
    call.cancel()
    return code


async def until(condition: Callable[[], Any]) -> None:
    """Wait until an awaited condition holds; files are followed in the background."""
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)
