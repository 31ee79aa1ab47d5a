"""An upload is there wholly and as declared, or nothing of it is there."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from lora_runtime.errors import AdapterAlreadyExists, InvalidRequest, RequestCancelled
from lora_runtime.types import AdapterId
from server.control.state import StateUnavailable
from server.control.uploads import MAX_MESSAGE_BYTES, Upload, UploadReceiver, UploadTooLarge, stored_folder
from server.pb.multilora.v1 import adapters_pb2

CONFIG = "adapter_config.json"
FILES = {
    CONFIG: b'{"peft_type": "LORA"}',
    "empty.txt": b"",
    "adapter_model.safetensors": bytes(range(256)) * 40,
    "1_Pooling/config.json": b"{}",
    "1_Pooling/empty": b"",
}
NEWS = AdapterId("acme", "news", 3)


def header(files: dict[str, bytes]) -> adapters_pb2.UploadHeader:
    declared = [
        adapters_pb2.UploadFile(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    ]
    return adapters_pb2.UploadHeader(name="news", files=declared)


def send(upload: Upload, data: bytes, size: int = 1000) -> None:
    for start in range(0, len(data), size):
        upload.write(data[start : start + size])


def send_all(upload: Upload, data: bytes, into: Path) -> None:
    send(upload, data)
    upload.finish(into)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_clean(folder: Path) -> bool:
    """Nothing is kept and nothing is on its way."""
    incoming = folder / "incoming"
    return not everything_in(folder) and not (incoming.exists() and any(incoming.iterdir()))


@pytest.fixture
def receiver(tmp_path: Path) -> UploadReceiver:
    return UploadReceiver(tmp_path, max_bytes=1 << 20)


@pytest.mark.parametrize("size", [1, 7, 256, 100_000])
def test_an_upload_is_stored_as_it_was_sent(receiver: UploadReceiver, tmp_path: Path, size: int) -> None:
    upload = receiver.begin(header(FILES))
    send(upload, b"".join(FILES.values()), size)
    into = stored_folder(tmp_path, NEWS)
    assert into == tmp_path / "adapters" / "acme" / "news" / "3"
    assert not into.exists(), "nothing is visible before the end"
    upload.finish(into)
    upload.abort()  # too late: does nothing
    assert everything_in(into) == FILES
    assert not any((tmp_path / "incoming").iterdir())


def test_files_may_all_be_empty(receiver: UploadReceiver, tmp_path: Path) -> None:
    files = {CONFIG: b"", "other": b""}
    upload = receiver.begin(header(files))
    upload.write(b"")
    upload.finish(tmp_path / "adapters" / "a" / "b" / "1")
    assert everything_in(tmp_path / "adapters" / "a" / "b" / "1") == files


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "/", "/etc/passwd", "../x", "a/../x", "a/..", "./x", "a//b", "a/", "/a", "a/b/c", ".hidden",
        "a/.hidden", ".git/config", "a\\b", "..\\x", "C:\\x", "a b", "a\0b", "a\nb", "name\n", "é", "a:b", "~root",
        "x" * 129, "adapter_model.bin", "a/b.PT", "x.pkl", "x.pth", "x.Bin", "ａ",
    ],
)  # fmt: skip
def test_a_hostile_name_is_refused(receiver: UploadReceiver, tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        receiver.begin(header({CONFIG: b"", path: b"content"}))
    assert refused.value.field == "header.files[1].path"
    assert refused.value.message.isprintable()
    assert is_clean(tmp_path)


@pytest.mark.parametrize(
    "paths",
    [("a.json", "a.json"), ("a.json", "A.JSON"), ("d/a", "D/A"), ("d", "d/a"), ("d/a", "D")],
)
def test_names_that_collide_are_refused(receiver: UploadReceiver, paths: tuple[str, str]) -> None:
    declared = header({CONFIG: b""})
    declared.files.extend(header({path: b""}).files[0] for path in paths)
    with pytest.raises(InvalidRequest, match="twice") as refused:
        receiver.begin(declared)
    assert refused.value.field in {"header.files[1].path", "header.files[2].path"}


def test_a_header_without_the_config_or_with_too_many_files_is_refused(receiver: UploadReceiver) -> None:
    for files in ({}, {"x.json": b""}, {CONFIG: b""} | {f"f{number}": b"" for number in range(64)}):
        with pytest.raises(InvalidRequest) as refused:
            receiver.begin(header(files))
        assert refused.value.field == "header.files"
    receiver.begin(header({CONFIG: b""} | {f"f{number}": b"" for number in range(63)})).abort()
    receiver.begin(header({f"default/{CONFIG}": b""})).abort()  # as PEFT saves an adapter that has a name


def test_sizes_and_digests_of_a_header_are_checked(receiver: UploadReceiver) -> None:
    negative = header(FILES)
    negative.files[2].num_bytes = -1
    with pytest.raises(InvalidRequest, match="negative"):
        receiver.begin(negative)
    for sha256 in ("", "ab" * 31, "AB" * 32, "zz" * 32, "ab" * 32 + "\n"):
        wrong = header(FILES)
        wrong.files[0].sha256 = sha256
        with pytest.raises(InvalidRequest) as refused:
            receiver.begin(wrong)
        assert refused.value.field == "header.files[0].sha256"


def test_an_upload_over_the_limit_is_refused_before_its_bytes(tmp_path: Path) -> None:
    receiver = UploadReceiver(tmp_path, max_bytes=100)
    receiver.begin(header({CONFIG: b"x" * 100})).abort()
    with pytest.raises(UploadTooLarge, match=r"101 bytes.*at most 100 \(--max-upload-mib\)"):
        receiver.begin(header({CONFIG: b"x" * 100, "more": b"x"}))
    huge = header({CONFIG: b"", "a": b"", "b": b""})
    huge.files[1].num_bytes = huge.files[2].num_bytes = (1 << 63) - 1
    with pytest.raises(UploadTooLarge):
        receiver.begin(huge)
    assert is_clean(tmp_path)


@pytest.mark.parametrize("sent", [0, 1, 20, 21, 22, 5000, 10_261, 10_262])
@pytest.mark.parametrize("aborted", [True, False])
def test_a_cut_upload_leaves_nothing(receiver: UploadReceiver, tmp_path: Path, sent: int, aborted: bool) -> None:
    data = b"".join(FILES.values())
    assert sent < len(data)
    upload = receiver.begin(header(FILES))
    send(upload, data[:sent])
    if not aborted:
        with pytest.raises(InvalidRequest, match=f"is cut: {len(data) - sent} bytes") as refused:
            upload.finish(stored_folder(tmp_path, NEWS))
        assert refused.value.field == "data"
    upload.abort()
    upload.abort()
    assert is_clean(tmp_path)
    with pytest.raises(RequestCancelled):
        upload.write(b"x")


def test_the_file_that_is_cut_is_named(receiver: UploadReceiver, tmp_path: Path) -> None:
    upload = receiver.begin(header(FILES))
    upload.write(FILES[CONFIG])
    with pytest.raises(InvalidRequest, match=r"adapter_model\.safetensors is cut"):
        upload.finish(stored_folder(tmp_path, NEWS))


@pytest.mark.parametrize("path", list(FILES))
def test_content_other_than_declared_is_refused(receiver: UploadReceiver, tmp_path: Path, path: str) -> None:
    declared = header(FILES)
    index = list(FILES).index(path)
    declared.files[index].sha256 = hashlib.sha256(b"something else").hexdigest()
    upload = receiver.begin(declared)
    send(upload, b"".join(FILES.values()))
    with pytest.raises(InvalidRequest, match=path.replace(".", r"\.")) as refused:
        upload.finish(stored_folder(tmp_path, NEWS))
    assert refused.value.field == f"header.files[{index}].sha256"
    assert is_clean(tmp_path)


def test_more_bytes_than_declared_are_refused(receiver: UploadReceiver, tmp_path: Path) -> None:
    secret = b"secret content"
    upload = receiver.begin(header({CONFIG: b"x" * 10}))
    upload.write(b"x" * 9)
    with pytest.raises(InvalidRequest, match="more bytes") as refused:
        upload.write(secret)
    assert refused.value.field == "data"
    assert secret.decode() not in str(refused.value.metadata) + refused.value.message
    assert is_clean(tmp_path)


def test_a_message_has_at_most_4_mib(tmp_path: Path) -> None:
    receiver = UploadReceiver(tmp_path, max_bytes=1 << 30)
    files = {CONFIG: bytes(MAX_MESSAGE_BYTES + 1)}
    upload = receiver.begin(header(files))
    upload.write(files[CONFIG][:MAX_MESSAGE_BYTES])
    upload.write(b"\0")
    upload.finish(stored_folder(tmp_path, NEWS))
    upload = receiver.begin(header(files))
    with pytest.raises(InvalidRequest, match="at most 4194304"):
        upload.write(files[CONFIG])


def test_a_stored_version_is_never_replaced(receiver: UploadReceiver, tmp_path: Path) -> None:
    into = stored_folder(tmp_path, NEWS)
    for content in (b"first", b"second"):
        upload = receiver.begin(header({CONFIG: content}))
        upload.write(content)
        if content == b"first":
            upload.finish(into)
        else:
            with pytest.raises(AdapterAlreadyExists, match="acme/news@3"):
                upload.finish(into)
    assert everything_in(tmp_path) == {"adapters/acme/news/3/adapter_config.json": b"first"}


@pytest.mark.parametrize("syncs", range(7))
def test_a_disk_that_fails_leaves_nothing(
    receiver: UploadReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int
) -> None:
    """The disk is full after so many syncs: of files, of folders, and of where the upload is moved to."""
    left = [None] * syncs

    def fsync(descriptor: int) -> None:  # noqa: ARG001
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()

    files = {CONFIG: b"{}", "weights": b"1234"}
    upload = receiver.begin(header(files))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StateUnavailable, match="No space left on device") as refused:
        send_all(upload, b"{}1234", stored_folder(tmp_path, NEWS))
    assert str(tmp_path) not in refused.value.message
    assert is_clean(tmp_path)


def test_an_abort_waits_for_the_write_of_another_thread(
    receiver: UploadReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a call is cancelled: its handler ends while a thread still writes."""
    writing, go_on = threading.Event(), threading.Event()

    def fsync(descriptor: int) -> None:  # noqa: ARG001
        writing.set()
        go_on.wait(10)

    upload = receiver.begin(header({CONFIG: b"{}", "more": b"1234"}))
    monkeypatch.setattr(os, "fsync", fsync)
    writer = threading.Thread(target=upload.write, args=(b"{}12",))
    aborter = threading.Thread(target=upload.abort)
    writer.start()
    writing.wait(10)
    aborter.start()
    aborter.join(0.05)
    assert aborter.is_alive()
    go_on.set()
    writer.join(10)
    aborter.join(10)
    assert is_clean(tmp_path)
    with pytest.raises(RequestCancelled):
        upload.write(b"34")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_uploads_hold_one_file_open_at_a_time(receiver: UploadReceiver, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    upload = receiver.begin(header({CONFIG: b"1"} | {f"f{number}": b"22" for number in range(60)}))
    for _ in range(120):
        upload.write(b"x")
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    upload.abort()
    assert len(os.listdir("/proc/self/fd")) == before
    assert is_clean(tmp_path)


def test_what_a_killed_server_left_is_removed_at_start(receiver: UploadReceiver, tmp_path: Path) -> None:
    registered, unknown = stored_folder(tmp_path, NEWS), stored_folder(tmp_path, AdapterId("acme", "news", 4))
    for into in (registered, unknown):
        upload = receiver.begin(header({CONFIG: b"{}"}))
        upload.write(b"{}")
        upload.finish(into)
    begun = receiver.begin(header(FILES))
    begun.write(b"begun")
    restarted = UploadReceiver(tmp_path, max_bytes=100)
    restarted.clean_incoming()
    restarted.clean_incoming()
    restarted.remove_all_but({registered})
    assert list(everything_in(tmp_path)) == ["adapters/acme/news/3/adapter_config.json"]
    begun.abort()


def test_removing_a_version_says_how_many_bytes_it_freed(receiver: UploadReceiver, tmp_path: Path) -> None:
    into = stored_folder(tmp_path, NEWS)
    upload = receiver.begin(header(FILES))
    send(upload, b"".join(FILES.values()))
    upload.finish(into)
    assert receiver.remove_stored(into) == sum(map(len, FILES.values()))
    assert receiver.remove_stored(into) == 0
    assert not into.exists()
    assert is_clean(tmp_path)
