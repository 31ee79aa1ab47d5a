"""What an upload says it is going to send, before a byte of it is taken."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.errors import InvalidRequest
from server.pb.multilora.v1 import adapters_pb2

MAX_FILES = 64

_PATH = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, slots=True)
class DeclaredFile:
    """A file of an upload; `path` is safe to use below a folder."""

    path: str
    num_bytes: int
    sha256: str


def declared_files(header: adapters_pb2.UploadHeader) -> list[DeclaredFile]:
    """The files of `header`; raises InvalidRequest on the field that is wrong."""
    files = [DeclaredFile(file.path, file.num_bytes, file.sha256) for file in header.files]
    if not 1 <= len(files) <= MAX_FILES:
        raise InvalidRequest("header.files", f"has {len(files)} files; an upload has 1 to {MAX_FILES}")
    folders = {file.path.lower().rpartition("/")[0] for file in files}
    seen: set[str] = set()
    for index, file in enumerate(files):
        field = f"header.files[{index}]"
        _check_path(f"{field}.path", file.path)
        if file.path.lower() in seen | folders:  # also where case makes no difference
            raise InvalidRequest(f"{field}.path", f"{file.path!r} is there twice, or is a folder of another")
        seen.add(file.path.lower())
        if file.num_bytes < 0:
            raise InvalidRequest(f"{field}.num_bytes", f"{file.num_bytes} is negative")
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidRequest(f"{field}.sha256", "is not a SHA-256 in 64 lower-case hex digits")
    if not any(file.path.rpartition("/")[2] == CONFIG_FILE for file in files):
        raise InvalidRequest("header.files", f"lacks {CONFIG_FILE}; send the whole folder that PEFT saved")
    return files


def _check_path(field: str, path: str) -> None:
    if not _PATH.fullmatch(path):
        message = "is not a file name of letters, digits, '.', '_' and '-', no '.' first, at most one folder deep"
        raise InvalidRequest(field, f"{path[:300]!r} {message}")
    if path.lower().endswith(_PICKLES):
        message = "is a pickle, which can run code and is never read; send safetensors instead"
        raise InvalidRequest(field, f"{path!r} {message}")
