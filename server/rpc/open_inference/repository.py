"""The repository: what is registered, and loads and unloads, which AdapterService does."""

from __future__ import annotations

from collections.abc import Mapping

from lora_runtime.catalogue import Catalogue
from lora_runtime.types import BASE_NAME, AdapterInfo, AdapterRef, AdapterState
from server.pb.multilora.v1 import adapters_pb2
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.adapters import AdapterService
from server.rpc.caller import caller
from server.rpc.context import Context
from server.rpc.open_inference.naming import fields_renamed, model_name, repository_reference
from server.rpc.open_inference.parameters import check_known

_LOADING = frozenset({AdapterState.FETCHING, AdapterState.HOST, AdapterState.COPYING})
_NOT_LOADED = "not loaded; its first request loads it"


def base_of(catalogue: Catalogue) -> AdapterInfo:
    return catalogue.resolve(AdapterRef(caller().tenant, BASE_NAME, None))


def index(catalogue: Catalogue, tenant: str | None, *, only_ready: bool) -> pb.RepositoryIndexResponse:
    """The base, and every version of a tenant's adapters, or of everybody's; in a thread: there may be thousands."""
    infos = [base_of(catalogue), *catalogue.list(tenant)]
    return pb.RepositoryIndexResponse(
        models=[_entry(info) for info in infos if not only_ready or info.state is AdapterState.READY]
    )


async def load(
    adapters: AdapterService, request: pb.RepositoryModelLoadRequest, context: Context
) -> pb.RepositoryModelLoadResponse:
    """Load and wait; raises as AdapterService, InvalidRequest for parameters, files among them."""
    _check_parameters(request.parameters, ())
    reference = repository_reference(request.repository_name, request.model_name)
    with fields_renamed():
        await adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter=reference, wait=True), context)
    return pb.RepositoryModelLoadResponse(model_name=request.model_name or request.repository_name, is_loaded=True)


async def unload(
    adapters: AdapterService, request: pb.RepositoryModelUnloadRequest, context: Context
) -> pb.RepositoryModelUnloadResponse:
    """Raises as AdapterService."""
    _check_parameters(request.parameters, ("unload_dependents",))
    reference = repository_reference(request.repository_name, request.model_name)
    with fields_renamed():
        await adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter=reference), context)
    return pb.RepositoryModelUnloadResponse(model_name=request.model_name or request.repository_name, is_unloaded=True)


def _check_parameters(parameters: Mapping[str, pb.ModelRepositoryParameter], known: tuple[str, ...]) -> None:
    check_known("parameters", parameters, known, "this method; a model's files are given where it is registered")


def _entry(info: AdapterInfo) -> pb.RepositoryIndexResponse.ModelIndex:
    state, reason = _state(info)
    return pb.RepositoryIndexResponse.ModelIndex(
        name=model_name(info.id), version=str(info.id.version), state=state, reason=reason
    )


def _state(info: AdapterInfo) -> tuple[str, str]:
    if info.state is AdapterState.READY:
        return "READY", ""
    if info.state in _LOADING:
        return "LOADING", ""
    if info.state is AdapterState.DRAINING:
        return "UNLOADING", ""
    return "UNAVAILABLE", _NOT_LOADED if info.failure is None else info.failure.message
