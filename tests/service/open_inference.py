"""A client of the Open Inference Protocol, made of its messages alone."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from server.pb.open_inference import grpc_service_pb2 as pb
from server.pb.open_inference import grpc_service_pb2_grpc
from tests.service.harness import Harness

_NUMBERS = {"FP32": "f", "INT32": "i"}


def stub_of(server: Harness) -> Any:
    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(server.channel)


def framed(texts: Iterable[str | bytes]) -> bytes:
    """Texts as raw contents have them."""
    blobs = [text.encode() if isinstance(text, str) else text for text in texts]
    return b"".join(struct.pack("<I", len(blob)) + blob for blob in blobs)


def set_parameters(parameters: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(parameters[name], kinds[type(value)], value)


def infer(
    model: str,
    inputs: dict[str, Sequence[str | bytes]],
    *,
    version: str = "",
    outputs: Iterable[str] = (),
    raw: bool = True,
    id_: str = "",
    **parameters: Any,
) -> pb.ModelInferRequest:
    """A request as clients send it: tensors [N, 1], raw or typed."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=id_)
    for name, texts in inputs.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[len(texts), 1])
        if raw:
            request.raw_input_contents.append(framed(texts))
        else:
            tensor.contents.bytes_contents.extend(text.encode() if isinstance(text, str) else text for text in texts)
    for name in outputs:
        request.outputs.add(name=name)
    set_parameters(request.parameters, parameters)
    return request


def tensors(response: pb.ModelInferResponse) -> dict[str, list[list[Any]]]:
    """The rows of each output, in the order of the response."""
    found: dict[str, list[list[Any]]] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        num_rows, width = output.shape
        values = _texts(raw) if output.datatype == "BYTES" else _numbers(raw, _NUMBERS[output.datatype])
        assert len(values) == num_rows * width, output.name
        found[output.name] = [values[row * width : (row + 1) * width] for row in range(num_rows)]
    return found


async def responses(call: Any) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    async for message in call:
        yield message


def _numbers(raw: bytes, kind: str) -> list[Any]:
    return [*struct.unpack(f"<{len(raw) // 4}{kind}", raw)]


def _texts(raw: bytes) -> list[str]:
    found, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return found
