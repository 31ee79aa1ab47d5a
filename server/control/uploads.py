"""Receiving an upload's files: nothing is visible before every byte has arrived and every SHA-256 agrees."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
import uuid
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lora_runtime.adapters.sources.disk import sync
from lora_runtime.errors import AdapterAlreadyExists, InvalidRequest, MultiloraError, RequestCancelled
from lora_runtime.types import AdapterId
from server.control.disk import make_folder, sync_file
from server.control.state import StateUnavailable
from server.control.upload_header import DeclaredFile, declared_files
from server.pb.multilora.v1 import adapters_pb2

MAX_MESSAGE_BYTES = 4 << 20


class UploadTooLarge(MultiloraError):
    """An upload is larger than this server takes; sending it again does not help."""

    reason = "UPLOAD_TOO_LARGE"

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"the upload has {num_bytes} bytes, this server takes at most {max_bytes} (--max-upload-mib)",
            num_bytes=num_bytes,
            limit=max_bytes,
        )


def stored_folder(folder: Path, adapter: AdapterId) -> Path:
    """Where the files of an uploaded version are kept in the state directory."""
    return folder / "adapters" / adapter.tenant / adapter.name / str(adapter.version)


class UploadReceiver:
    """The uploaded files of a state directory; any thread may call."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._incoming = folder / "incoming"  # on the same disk as `adapters`, so that a rename moves between them
        self._stored = folder / "adapters"
        self._max_bytes = max_bytes

    def begin(self, header: adapters_pb2.UploadHeader) -> Upload:
        """Make room for the files of `header`, whose adapter name and version are not looked at.

        Raises InvalidRequest on a field of `header`, UploadTooLarge, StateUnavailable.
        """
        files = declared_files(header)
        if (total := sum(file.num_bytes for file in files)) > self._max_bytes:
            raise UploadTooLarge(total, self._max_bytes)
        with _writing():
            folder = self._new_path()
            folder.mkdir()
        return Upload(folder, files)

    def clean_incoming(self) -> None:
        """Remove what uploads and removals left when the server was killed. Only at start, before the first upload."""
        shutil.rmtree(self._incoming, ignore_errors=True)

    def stored_bytes(self, path: Path) -> int:
        """Bytes that the files of an uploaded version have. Raises StateUnavailable."""
        assert path.is_relative_to(self._stored), path
        with _writing():
            return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())

    def remove_stored(self, path: Path) -> int:
        """Remove the files of an uploaded version; the bytes that became free, 0 when there was nothing.

        Raises StateUnavailable.
        """
        if not path.is_dir():
            return 0
        num_bytes = self.stored_bytes(path)
        with _writing():
            doomed = path.rename(self._new_path())  # at once, so that no half of it is ever loaded
            sync(path.parent)
        shutil.rmtree(doomed, ignore_errors=True)
        return num_bytes

    def remove_all_but(self, kept: Collection[Path]) -> None:
        """Remove stored versions that are not `kept`: the server was killed before it registered or removed them."""
        for path in list(self._stored.glob("*/*/*")):
            if path not in kept:
                self.remove_stored(path)

    def _new_path(self) -> Path:
        self._incoming.mkdir(parents=True, exist_ok=True)
        return self._incoming / uuid.uuid4().hex


class Upload:
    """One upload on its way. A call that raises ends it and removes what has arrived.

    Any thread may call: an abort waits for the write that is being done, and those that follow get RequestCancelled.
    """

    def __init__(self, folder: Path, files: list[DeclaredFile]) -> None:
        self._mutex = threading.Lock()
        self._folder = folder
        self._files = files
        self._remaining = sum(file.num_bytes for file in files)
        self._digests: list[str] = []  # of the files that are complete
        self._stream: BinaryIO | None = None  # the file that is being written
        self._hash = hashlib.sha256()
        self._left = 0  # bytes that file still lacks
        self._ended = False

    def write(self, data: bytes) -> None:
        """The next bytes of all files, one after the other. Raises InvalidRequest on field `data`, StateUnavailable."""
        with self._step():
            if len(data) > MAX_MESSAGE_BYTES:
                raise InvalidRequest("data", f"has {len(data)} bytes; a message carries at most {MAX_MESSAGE_BYTES}")
            if len(data) > self._remaining:
                raise InvalidRequest("data", "has more bytes than the files of the header; correct their num_bytes")
            self._append(memoryview(data))

    def finish(self, into: Path) -> None:
        """Check that all is there and keep it, durably, as the folder `into`.

        Raises InvalidRequest, AdapterAlreadyExists when `into` has files, StateUnavailable.
        """
        with self._step():
            self._finish_empty_files()
            self._check_complete()
            for folder in {(self._folder / file.path).parent for file in self._files} | {self._folder}:
                sync(folder)
            make_folder(into.parent)
            self._move(into)
            sync(into.parent)
            self._ended = True

    def abort(self) -> None:
        """Remove what has arrived, unless the upload has ended. Idempotent."""
        with self._mutex:
            if not self._ended:
                self._discard()

    @contextmanager
    def _step(self) -> Generator[None]:
        with self._mutex, _writing():
            if self._ended:  # the call was cancelled while a thread still had its bytes
                raise RequestCancelled("the upload has ended; begin a new one")
            try:
                yield
            except BaseException:
                self._discard()  # after a failed write, what is on disk is not what was hashed
                raise

    def _discard(self) -> None:
        self._ended = True
        if self._stream is not None:
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _append(self, data: memoryview) -> None:
        while data:
            stream = self._stream or self._open()
            part = data[: self._left]
            stream.write(part)
            self._hash.update(part)
            self._left -= len(part)
            self._remaining -= len(part)
            data = data[len(part) :]
            if self._left == 0:
                self._close(stream)

    def _finish_empty_files(self) -> None:
        while self._stream is None and len(self._digests) < len(self._files):
            if self._files[len(self._digests)].num_bytes > 0:
                return
            self._close(self._open())

    def _open(self) -> BinaryIO:
        file = self._files[len(self._digests)]
        path = self._folder / file.path
        path.parent.mkdir(exist_ok=True)
        self._stream = path.open("xb")
        self._hash = hashlib.sha256()
        self._left = file.num_bytes
        return self._stream

    def _close(self, stream: BinaryIO) -> None:
        sync_file(stream)
        stream.close()
        self._stream = None
        self._digests.append(self._hash.hexdigest())

    def _check_complete(self) -> None:
        if self._remaining:
            path = self._files[len(self._digests)].path
            raise InvalidRequest(
                "data", f"{path} is cut: {self._remaining} bytes of the upload are missing; send it again"
            )
        for index, (file, sha256) in enumerate(zip(self._files, self._digests, strict=True)):
            if file.sha256 != sha256:
                message = f"is not the SHA-256 of the bytes received as {file.path}, {sha256}; send the upload again"
                raise InvalidRequest(f"header.files[{index}].sha256", message)

    def _move(self, into: Path) -> None:
        try:
            self._folder = self._folder.rename(into)  # where it is removed from if what follows fails
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            tenant, name, version = into.parts[-3:]
            raise AdapterAlreadyExists(f"{tenant}/{name}@{version}") from error


@contextmanager
def _writing() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StateUnavailable(error.strerror) from error
