"""Models as their metadata and configuration tell of them."""

from __future__ import annotations

import json
from importlib import metadata

from lora_runtime.catalogue import Catalogue
from lora_runtime.types import AdapterCard, AdapterId
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.open_inference.dialects import main_dialect
from server.rpc.open_inference.naming import model_name
from server.rpc.open_inference.tensors import Datatype

SERVER = "multilora"  # also the platform and the backend of every model
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
)
_TYPES: dict[Datatype, pb.DataType.ValueType] = {
    "BYTES": pb.TYPE_STRING,
    "FP32": pb.TYPE_FP32,
    "INT32": pb.TYPE_INT32,
}


def server_metadata() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name=SERVER, version=metadata.version("multilora"), extensions=EXTENSIONS)


def model_metadata(adapter: AdapterId, card: AdapterCard, catalogue: Catalogue) -> pb.ModelMetadataResponse:
    """`versions`: all that are registered, ascending."""
    dialect = main_dialect(card)
    tensor = pb.ModelMetadataResponse.TensorMetadata
    versions = [1] if adapter.is_base else catalogue.versions(adapter.tenant, adapter.name)
    return pb.ModelMetadataResponse(
        name=model_name(adapter),
        versions=map(str, versions),
        platform=SERVER,
        inputs=[tensor(name=spec.name, datatype="BYTES", shape=[-1, 1]) for spec in dialect.inputs(card)],
        outputs=[
            tensor(name=spec.name, datatype=spec.datatype, shape=[-1, spec.width]) for spec in dialect.outputs(card)
        ],
    )


def model_config(adapter: AdapterId, card: AdapterCard, max_inputs: int) -> pb.ModelConfig:
    dialect = main_dialect(card)
    config = pb.ModelConfig(
        name=model_name(adapter),
        platform=SERVER,
        backend=SERVER,
        max_batch_size=max_inputs,
        input=[
            pb.ModelInput(name=spec.name, data_type=pb.TYPE_STRING, dims=[1], optional=spec.optional)
            for spec in dialect.inputs(card)
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=_TYPES[spec.datatype], dims=[spec.width])
            for spec in dialect.outputs(card)
        ],
        dynamic_batching=pb.ModelDynamicBatching(),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=dialect.is_decoupled),
    )
    config.parameters["task"].string_value = dialect.task.value
    if card.labels is not None:
        config.parameters["labels"].string_value = json.dumps(card.labels)
    if card.max_length is not None:
        config.parameters["max_length"].string_value = str(card.max_length)
    return config
