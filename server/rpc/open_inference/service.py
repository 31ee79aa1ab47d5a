"""GRPCInferenceService: the protocol's methods, each a translation of one of ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import AdapterNotFound, AliasNotFound, EngineStopped, InvalidRequest
from lora_runtime.types import AdapterCard, AdapterId, AdapterInfo, AdapterState
from server.backend import BackendSlot, ServerStarting
from server.pb.open_inference import grpc_service_pb2 as pb
from server.pb.open_inference import grpc_service_pb2_grpc
from server.rpc.adapters import AdapterService
from server.rpc.caller import caller, require, resolve, tenant_filter
from server.rpc.context import Context
from server.rpc.open_inference import repository
from server.rpc.open_inference.describing import model_config, model_metadata, server_metadata
from server.rpc.open_inference.inferring import Inferring, card_of
from server.rpc.open_inference.naming import fields_renamed, reference_of
from server.rpc.open_inference.statistics import statistics
from server.rpc.open_inference.streaming import InferStream
from server.rpc.path import InferencePath, described
from server.tenancy.model import Role
from server.tenancy.usage import UsageMeter

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
STREAM_METHOD = f"{SERVICE}/ModelStreamInfer"


class OpenInferenceService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """Belongs to the asyncio loop."""

    def __init__(
        self, slot: BackendSlot, path: InferencePath, adapters: AdapterService, meter: UsageMeter, max_inputs: int
    ) -> None:
        self._slot = slot
        self._adapters = adapters
        self._meter = meter
        self._max_inputs = max_inputs
        self._inferring = Inferring(path, slot, max_inputs)
        self._is_draining = False
        self._stopping = asyncio.Event()

    def drain(self) -> None:
        """Not ready any more; what comes is still answered."""
        self._is_draining = True

    def close(self) -> None:
        """Streams end once what was asked on them is answered."""
        self._stopping.set()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        del request, context
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        del request, context
        try:
            self._slot.get()
        except (ServerStarting, EngineStopped):
            return pb.ServerReadyResponse(ready=False)
        return pb.ServerReadyResponse(ready=not self._is_draining)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        del context
        require(Role.INFER, Role.ADAPTERS)
        try:
            info = self._resolved(request)
        except (AdapterNotFound, AliasNotFound):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=info.state is AdapterState.READY)

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        del request, context
        return server_metadata()

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        del context
        adapter, card = await self._described(request)
        return model_metadata(adapter, card, self._catalogue)

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        del context
        adapter, card = await self._described(request)
        return pb.ModelConfigResponse(config=model_config(adapter, card, self._max_inputs))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        return await self._inferring.answer(request, context)

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse]:
        require(Role.INFER)
        stream = InferStream(self._inferring, self._stopping, context)
        async with aclosing(stream.run(request_iterator)) as messages:
            async for message in messages:
                yield message

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        del context
        principal = caller()
        tenant = None if principal.has(Role.OPERATOR) else principal.tenant
        catalogue, info = self._catalogue, self._resolved(request) if request.name else None

        def collect() -> pb.ModelStatisticsResponse:
            return statistics(self._meter, tenant, _models(catalogue, info, request.version))

        return await asyncio.to_thread(collect)

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        del context
        require(Role.INFER, Role.ADAPTERS)
        try:
            tenant = tenant_filter(request.repository_name)
        except InvalidRequest as error:
            raise error.at("repository_name") from error
        return await asyncio.to_thread(repository.index, self._catalogue, tenant, only_ready=request.ready)

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        return await repository.load(self._adapters, request, context)

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        return await repository.unload(self._adapters, request, context)

    @property
    def _catalogue(self) -> Catalogue:
        return self._slot.get().engine.catalogue

    def _resolved(self, request: pb.ModelReadyRequest | pb.ModelStatisticsRequest) -> AdapterInfo:
        reference = reference_of(request.name, request.version, field="name", version_field="version")
        with fields_renamed("name"):
            return resolve(self._catalogue, reference)

    async def _described(
        self, request: pb.ModelMetadataRequest | pb.ModelConfigRequest
    ) -> tuple[AdapterId, AdapterCard]:
        require(Role.INFER, Role.ADAPTERS)
        reference = reference_of(request.name, request.version, field="name", version_field="version")
        with fields_renamed("name"):
            info = await described(self._slot.get().engine, reference)
        return info.id, card_of(info)


def _models(catalogue: Catalogue, info: AdapterInfo | None, version: str) -> list[AdapterId]:
    """The versions whose statistics are asked for: one, all of a model, or all of the caller's tenant and the base."""
    if info is None:
        return [repository.base_of(catalogue).id, *(known.id for known in catalogue.list(caller().tenant))]
    if version or info.id.is_base:
        return [info.id]
    adapter = info.id
    return [
        AdapterId(adapter.tenant, adapter.name, known) for known in catalogue.versions(adapter.tenant, adapter.name)
    ]
