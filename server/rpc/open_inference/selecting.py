"""The outputs that a request asks for, and Triton's extension that turns scores into ranked texts."""

from __future__ import annotations

from dataclasses import dataclass

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterCard
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.call import CallReply, CallRequest
from server.rpc.open_inference.dialect import Dialect, OutputSpec
from server.rpc.open_inference.parameters import check_known, integer
from server.rpc.open_inference.tensors import Tensor

_RANKED = "classification"


@dataclass(frozen=True, slots=True)
class Selected:
    """One output of a response; `num_ranked`: as its highest values with place and label. None: as it is."""

    name: str
    num_ranked: int | None = None

    def of(self, tensors: dict[str, Tensor], labels: tuple[str, ...]) -> Tensor:
        """[N, `num_ranked`] texts such as `0.75:2:sport`, or the tensor."""
        tensor = tensors[self.name]
        return tensor if self.num_ranked is None else _ranked(tensor, labels, self.num_ranked)


def select(
    request: pb.ModelInferRequest, dialect: Dialect[CallRequest, CallReply], card: AdapterCard
) -> tuple[Selected, ...]:
    """All outputs of a dialect, or those that are asked for, in that order; raises InvalidRequest."""
    specs = {spec.name: spec for spec in dialect.outputs(card)}
    if not request.outputs:
        return tuple(map(Selected, specs))
    selected = tuple(_selected(asked, specs[asked.name]) for asked in request.outputs)
    names = [output.name for output in selected]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"outputs.{name}", "is asked for twice")
    return selected


def _selected(asked: pb.ModelInferRequest.InferRequestedOutputTensor, spec: OutputSpec) -> Selected:
    place = f"outputs.{spec.name}.parameters"
    check_known(place, asked.parameters, (_RANKED,) if spec.is_ranked else (), "this output; it comes as raw contents")
    if _RANKED not in asked.parameters:
        return Selected(spec.name)
    num_ranked = integer(f"{place}.{_RANKED}", asked.parameters[_RANKED])
    if num_ranked < 1:
        raise InvalidRequest(f"{place}.{_RANKED}", f"{num_ranked} is less than 1")
    return Selected(spec.name, num_ranked)


def _ranked(tensor: Tensor, labels: tuple[str, ...], num_ranked: int) -> Tensor:
    rows: list[list[str]] = []
    for row in tensor.rows:
        values = [float(value) for value in row]
        best = sorted(range(len(values)), key=lambda index: -values[index])[:num_ranked]
        rows.append([f"{values[index]:.9g}:{index}:{labels[index]}" for index in best])
    return Tensor("BYTES", rows)
