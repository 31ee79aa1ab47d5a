"""Tensors: texts out of a request's inputs, and the rows of a reply as raw bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias, TypeVar

from lora_runtime.errors import InvalidRequest
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.open_inference.parameters import check_known

Datatype: TypeAlias = Literal["BYTES", "FP32", "INT32"]
T = TypeVar("T")
_FORMATS = {"FP32": "f", "INT32": "i"}
_MAX_NAME = 64  # of a caller's names in errors


@dataclass(frozen=True, slots=True)
class Tensor:
    """[N, width]: rows of one length."""

    datatype: Datatype
    rows: Sequence[Sequence[str]] | Sequence[Sequence[float]]

    def raw(self) -> bytes:
        """Its elements, row by row, little-endian; each text after its length in 4 bytes."""
        values = chain.from_iterable(self.rows)
        if self.datatype == "BYTES":
            return b"".join(_framed(str(text)) for text in values)
        flat = [*values]
        return struct.pack(f"<{len(flat)}{_FORMATS[self.datatype]}", *flat)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.rows[0])


def padded(rows: Sequence[Sequence[str]], datatype: Datatype = "BYTES") -> Tensor:
    """Texts of rows of several lengths, empty ones at the end of those that are shorter."""
    return Tensor(datatype, _filled(rows, ""))


def padded_numbers(rows: Sequence[Sequence[float]], datatype: Datatype) -> Tensor:
    """As `padded`, with zeros."""
    return Tensor(datatype, _filled(rows, 0))


def read_texts(request: pb.ModelInferRequest, limit: int) -> dict[str, list[str]]:
    """The texts of each input by its name: [N] each, with the same N, at most `limit`.

    Raises InvalidRequest on the input's part that is wrong.
    """
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        problem = f"has {len(raws)} entries for {len(request.inputs)} inputs; give one for each input, or none"
        raise InvalidRequest("raw_input_contents", problem)
    texts: dict[str, list[str]] = {}
    for index, tensor in enumerate(request.inputs):
        place = f"inputs.{tensor.name[:_MAX_NAME] or f'[{index}]'}"
        if not tensor.name or tensor.name in texts:
            raise InvalidRequest(f"{place}.name", "is given twice" if tensor.name else "is empty; name the tensor")
        num_texts = _num_texts(place, tensor, limit)
        elements = _elements(place, tensor, raws[index] if raws else None, num_texts)
        texts[tensor.name] = [_decoded(f"{place}[{i}]", element) for i, element in enumerate(elements)]
    sizes = {name: len(values) for name, values in texts.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name[:_MAX_NAME]} {size}" for name, size in sizes.items())
        raise InvalidRequest("inputs", f"differ in their first dimension: {shown}")
    return texts


def _num_texts(place: str, tensor: pb.ModelInferRequest.InferInputTensor, limit: int) -> int:
    if tensor.datatype != "BYTES":
        raise InvalidRequest(f"{place}.datatype", f"{tensor.datatype[:_MAX_NAME]!r} is not BYTES, which texts are")
    check_known(f"{place}.parameters", tensor.parameters, (), "an input; shared memory is not read")
    shape = [*tensor.shape]
    if len(shape) not in (1, 2) or shape[0] < 1 or shape[1:] not in ([], [1]):
        raise InvalidRequest(f"{place}.shape", f"{shape[:8]} is neither [N] nor [N, 1] with N of at least 1")
    if shape[0] > limit:
        raise InvalidRequest(
            f"{place}.shape", f"has {shape[0]} texts, the limit is {limit}; send several requests", limit=limit
        )
    return shape[0]


def _elements(
    place: str, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, num_texts: int
) -> Sequence[bytes]:
    contents = tensor.contents
    if raw is not None:
        if tensor.HasField("contents"):
            raise InvalidRequest(f"{place}.contents", "is given with raw_input_contents; give one of them")
        return _unframed(place, raw, num_texts)
    for field, _ in contents.ListFields():
        if field.name != "bytes_contents":
            raise InvalidRequest(f"{place}.contents.{field.name}", "is given; texts come in bytes_contents")
    if len(contents.bytes_contents) != num_texts:
        problem = f"has {len(contents.bytes_contents)} entries, the shape says {num_texts}"
        raise InvalidRequest(f"{place}.contents.bytes_contents", problem)
    return contents.bytes_contents


def _unframed(place: str, raw: bytes, num_texts: int) -> list[bytes]:
    """As many texts as the shape says, and nothing after them."""
    found: list[bytes] = []
    at = 0
    for _ in range(num_texts):
        if len(raw) < at + 4 or len(raw) < (end := at + 4 + int.from_bytes(raw[at : at + 4], "little")):
            problem = (
                f"ends in text {len(found)} of {num_texts}; each text is 4 bytes of little-endian length, then its"
            )
            raise InvalidRequest(f"{place}.raw_input_contents", f"{problem} bytes")
        found.append(raw[at + 4 : end])
        at = end
    if at != len(raw):
        raise InvalidRequest(f"{place}.raw_input_contents", f"has {len(raw) - at} bytes more than the shape says")
    return found


def _decoded(place: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(place, f"is not UTF-8 at byte {error.start}") from None


def _framed(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "little") + data


def _filled(rows: Sequence[Sequence[T]], blank: T) -> list[list[T]]:
    width = max(1, *map(len, rows))
    return [[*row, *(blank for _ in range(width - len(row)))] for row in rows]


def output_messages(
    named: Iterable[tuple[str, Tensor]],
) -> tuple[list[pb.ModelInferResponse.InferOutputTensor], list[bytes]]:
    """Tensors as a response has them: what they are, and their elements."""
    tensors = [*named]
    messages = [
        pb.ModelInferResponse.InferOutputTensor(name=name, datatype=tensor.datatype, shape=tensor.shape)
        for name, tensor in tensors
    ]
    return messages, [tensor.raw() for _, tensor in tensors]
