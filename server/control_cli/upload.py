"""Sending an adapter's folder: which files count, their hashes, and their bytes in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import grpc
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from server.control_cli.client import Client, ControlError
from server.pb.multilora.v1 import adapters_pb2

CONFIG_FILE = "adapter_config.json"
_POOLING_FILE = "1_Pooling/config.json"
_SENT = (
    CONFIG_FILE,
    "adapter_model*.safetensors",
    "adapter_model*.safetensors.index.json",
    "multilora.json",
    "config.json",
    "modules.json",
    "tokenizer*.json",
    "tokenizer*.txt",
    "tokenizer*.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a folder is sent, by path relative to it, and what is not."""

    sent: tuple[str, ...]
    skipped: tuple[str, ...]


def select_files(folder: Path) -> Selection:
    """Raises ControlError unless the folder is an adapter's, with safetensors weights."""
    if not folder.is_dir():
        raise ControlError(f"{folder} is {'not a folder' if folder.exists() else 'not there'}")
    sent, skipped = list[str](), list[str]()
    for child in sorted(folder.iterdir()):
        if child.is_file() and _is_sent(child.name):
            sent.append(child.name)
        elif child.name == "1_Pooling" and (folder / _POOLING_FILE).is_file():
            sent.append(_POOLING_FILE)
            skipped += [f"{child.name}/{path.name}" for path in sorted(child.iterdir()) if path.name != "config.json"]
        else:
            skipped.append(child.name + "/" * child.is_dir())
    if CONFIG_FILE not in sent:
        raise ControlError(f"{folder} has no {CONFIG_FILE}; {_remedy(folder)}")
    if not any(name.endswith(".safetensors") for name in sent):
        raise ControlError(
            f"{folder} has no adapter_model.safetensors; save the adapter with PEFT (pickles are not sent)"
        )
    return Selection(tuple(sent), tuple(skipped))


def upload(
    client: Client, header: adapters_pb2.UploadHeader, folder: Path, selection: Selection
) -> adapters_pb2.UploadAdapterResponse:
    """Send the files; where the connection breaks, all of it again under the same request id."""
    header.files.extend(_describe(folder, name) for name in selection.sent)
    console = Console(stderr=True)
    columns = TextColumn("sending"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=sum(file.num_bytes for file in header.files))

        def attempt(timeout_s: float) -> adapters_pb2.UploadAdapterResponse:
            progress.reset(bar)
            sender = _Sender(header, folder, lambda num_bytes: progress.advance(bar, num_bytes))
            try:
                return client.stub.UploadAdapter(sender.messages(), timeout=timeout_s)
            except grpc.RpcError:
                if sender.fault is not None:
                    raise ControlError(sender.fault) from None
                raise

        return client.retry(attempt)


class _Sender:
    """The messages of one upload, made in gRPC's thread, where nothing may be raised: `fault` tells what went wrong."""

    def __init__(self, header: adapters_pb2.UploadHeader, folder: Path, on_sent: Callable[[int], None]) -> None:
        self.fault: str | None = None
        self._header = header
        self._folder = folder
        self._on_sent = on_sent

    def messages(self) -> Generator[adapters_pb2.UploadAdapterRequest]:
        """Ends early at a fault, which makes the server refuse the whole."""
        yield adapters_pb2.UploadAdapterRequest(header=self._header)
        try:
            for file in self._header.files:
                for piece in self._pieces(file):
                    yield adapters_pb2.UploadAdapterRequest(data=piece)
                    self._on_sent(len(piece))
        except OSError as error:
            self.fault = str(error)

    def _pieces(self, file: adapters_pb2.UploadFile) -> Generator[bytes]:
        left = file.num_bytes
        with (self._folder / file.path).open("rb") as stream:
            while left:
                piece = stream.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise OSError(f"{file.path} became shorter while it was sent; upload it again")
                left -= len(piece)
                yield piece


def _is_sent(name: str) -> bool:
    return not name.endswith(_PICKLES) and any(fnmatchcase(name, pattern) for pattern in _SENT)


def _describe(folder: Path, name: str) -> adapters_pb2.UploadFile:
    with (folder / name).open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return adapters_pb2.UploadFile(path=name, num_bytes=stream.tell(), sha256=sha256)


def _remedy(folder: Path) -> str:
    """PEFT saves a named adapter in a sub-folder of that name."""
    named: Sequence[Path] = sorted(folder.glob(f"*/{CONFIG_FILE}"))
    return f"upload {named[0].parent} instead" if named else "it is not the folder of a PEFT adapter"
