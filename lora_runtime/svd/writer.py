"""One safetensors file, written a tensor at a time: each goes to the disk at once, so memory holds one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorWriter:
    """Collects tensors beside `path`, one file for each dtype; `close` makes one safetensors file of them.

    The format's header comes first and needs every size, hence the detour. Wider dtypes lie first, so that every
    tensor is aligned.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spooled: dict[torch.dtype, dict[str, tuple[int, ...]]] = {}
        self.num_parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a floating tensor; its name must be new."""
        assert not any(name in known for known in self._spooled.values()), f"{name} is written twice"
        tensor = tensor.detach().contiguous()
        with self._spool(tensor.dtype).open("ab") as stream:
            stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self._spooled.setdefault(tensor.dtype, {})[name] = tuple(tensor.shape)
        self.num_parameters += tensor.numel()

    def close(self) -> int:
        """Write the file and take the detour's away; the file's bytes."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        order = sorted(self._spooled, key=lambda dtype: (-dtype.itemsize, str(dtype)))
        for dtype in order:
            for name, shape in self._spooled[dtype].items():
                end = start + dtype.itemsize * torch.Size(shape).numel()
                header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
                start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for dtype in order:
                with self._spool(dtype).open("rb") as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
                self._spool(dtype).unlink()
        return self._path.stat().st_size

    def _spool(self, dtype: torch.dtype) -> Path:
        return self._path.with_name(f".{self._path.name}.{_NAMES[dtype]}")
