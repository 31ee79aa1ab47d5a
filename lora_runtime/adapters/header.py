"""The safetensors header, and tensors read by it. The header alone gives names, shapes and dtypes: no value is read.

numpy only, see `checkpoint.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lora_runtime.errors import AdapterRejected

MAX_HEADER_BYTES = 16 << 20
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NUMPY = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies, without its values."""

    key: str
    file: str
    dtype: str  # as the format writes it: "F32"
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def where(self) -> str:
        return f"{self.file} tensor {self.key}"

    def refuse(self, code: str, message: str) -> NoReturn:
        raise AdapterRejected(code, self.where, message)


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file, by key; raises AdapterRejected unless they are floating and fill the file."""
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        length = _header_length(stream.read(8), file_bytes, path.name)
        return _tensor_refs(stream.read(length), file_bytes, path.name)


def header_of(data: bytes | bytearray, file: str) -> dict[str, TensorRef]:
    """As `read_header`, of a whole file in memory."""
    length = _header_length(data[:8], len(data), file)
    return _tensor_refs(data[8 : 8 + length], len(data), file)


def _header_length(first: bytes | bytearray, file_bytes: int, file: str) -> int:
    length = int.from_bytes(first, "little")
    if file_bytes < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
        message = f"is cut short or has a header of {length} bytes (limit {MAX_HEADER_BYTES}); copy it again"
        raise AdapterRejected("WEIGHTS_CORRUPT", file, message)
    return length


def _tensor_refs(header: bytes | bytearray, file_bytes: int, file: str) -> dict[str, TensorRef]:
    start = 8 + len(header)
    entries = _parse(header, file).items()
    tensors = {key: _tensor_ref(file, key, entry, start) for key, entry in entries if key != "__metadata__"}
    cursor = start
    for ref in sorted(tensors.values(), key=lambda ref: (ref.start, ref.end)):
        if ref.start != cursor:
            ref.refuse("WEIGHTS_CORRUPT", "does not begin where the tensor before it ends")
        cursor = ref.end
    if cursor != file_bytes:
        message = f"has {file_bytes} bytes, its header speaks of {cursor}; copy it again"
        raise AdapterRejected("WEIGHTS_CORRUPT", file, message)
    return tensors


def _parse(data: bytes | bytearray, file: str) -> dict[str, Any]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise AdapterRejected("DUPLICATE_TENSOR", f"{file} tensor {double}", "appears twice in the header")
        return seen

    try:
        header = json.loads(data, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected("WEIGHTS_CORRUPT", file, f"has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise AdapterRejected("WEIGHTS_CORRUPT", file, "has a header that is not a JSON object")
    return header


def _tensor_ref(file: str, key: str, entry: Any, data_start: int) -> TensorRef:
    where = f"{file} tensor {key}"
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        message = f"has dtype {dtype}; floating F64, F32, F16 or BF16 is needed"
        raise AdapterRejected("DTYPE_UNSUPPORTED", where, message)
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise AdapterRejected("WEIGHTS_CORRUPT", where, "has no shape and data_offsets of whole numbers")
    ref = TensorRef(key, file, dtype, shape, data_start + offsets[0], data_start + offsets[1])
    if ref.end - ref.start != ref.size * _ITEM_BYTES[dtype]:
        ref.refuse("WEIGHTS_CORRUPT", f"has {ref.end - ref.start} bytes, which is not its shape {list(shape)}")
    return ref


def _counts(values: Any) -> tuple[int, ...] | None:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        return None
    return tuple(values)


def read_tensor(ref: TensorRef, data: bytes | bytearray) -> Array:
    """The values of a tensor in the bytes of its file, as float32; exact, but for float64. It may share the bytes.

    Raises AdapterRejected for a value that is not finite.
    """
    stored = np.frombuffer(data, _NUMPY[ref.dtype], ref.size, ref.start).reshape(ref.shape)
    if ref.dtype == "BF16":  # the upper half of a float32, which numpy has no name for
        array = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused
            array = stored.astype(np.float32, copy=not stored.flags.aligned)
    if not np.isfinite(array).all():
        ref.refuse(
            "NOT_FINITE", "has a NaN, an infinite value, or one beyond the range of float32; its training diverged"
        )
    return array


def rounded_to(array: Array, dtype: str) -> Array:
    """`array` as it would come back from a file of `dtype`."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    if dtype != "BF16":
        return array
    bits = np.ascontiguousarray(array).view(np.uint32)
    nearest_even = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return nearest_even.view(np.float32)
