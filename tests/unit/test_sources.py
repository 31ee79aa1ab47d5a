"""Adapters come whole and as pinned from web servers, stores and the hub, or are refused with a reason."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import huggingface_hub
import huggingface_hub.constants
import pytest

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.sources.cache import DiskCache
from lora_runtime.adapters.sources.fetch import ANY, Fetcher
from lora_runtime.adapters.sources.hub import HubSource
from lora_runtime.adapters.sources.store import StoreSource
from lora_runtime.adapters.sources.urls import shown_url
from lora_runtime.errors import AdapterRejected, LoadCancelled, MultiloraError, SourceUnavailable

GO = threading.Event()  # never set
MIB = 1 << 20
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": bytes(range(256)) * 4096 * 3,  # 3 MiB: three pieces
    "1_Pooling/config.json": b"{}",
}
LEFT = {"optimizer.pt": b"x" * 99, "adapter_model.bin": b"pickle", "README.md": b"", "checkpoint-1/config.json": b"{}"}


class Web:
    """A web server of files; it can lack ranges, cut connections, and answer errors."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.has_ranges = True
        self.faults: list[int] = []  # statuses answered first
        self.cut_after: int | None = None  # bytes of the second piece of a file that are sent, once
        self.before_get: Callable[[str], object] = str  # called with the path of each GET
        self.got: list[tuple[str, str]] = []  # path and range of each GET
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                web.answer(self, body=False)

            def do_GET(self) -> None:
                web.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # the default of 5 loses connections, which come again a second later
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = handler.path.partition("?")[0].lstrip("/")
        content = self.content(path)
        status = self.faults.pop(0) if self.faults else 404 if content is None else 200
        if status != 200 or content is None:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        total, etag = len(content), hashlib.sha256(content).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", "")) if self.has_ranges else None
        if body:
            self.before_get(path)
            self.got.append((path, handler.headers.get("Range", "")))
        if asked:
            begin, end = int(asked[1]), int(asked[2] or total - 1)
            content = content[begin : end + 1]
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{begin + len(content) - 1}/{total}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if body and self.cut_after is not None and asked and int(asked[1]) == MIB:
            handler.wfile.write(content[: self.cut_after])
            self.cut_after = None
            handler.close_connection = True
        elif body:
            handler.wfile.write(content)

    def content(self, path: str) -> bytes | None:
        """A file, or what the hub's API says of the repository org/name."""
        if re.fullmatch(r"api/models/org/name(/revision/(main|v2|" + COMMIT + "))?", path):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
        return self.files.get(path.removeprefix(f"org/name/resolve/{COMMIT}/"))


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web(dict(ADAPTER | LEFT))
    yield server
    server.close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests run with the hub switched off; these have one of their own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # it keeps what it was made with
    yield
    huggingface_hub.close_session()


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an adapter in a store."""
    store, path = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/a"
    for name, data in (ADAPTER | LEFT).items():
        store.pipe(f"{path}/{name}", data)
    yield f"memory:/{path}"
    store.rm(path, recursive=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(call: Callable[[], object]) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        call()
    return caught.value


def test_the_files_of_an_adapter_are_fetched_and_no_others(web: Web, memory: str, tmp_path: Path) -> None:
    for number, url in enumerate((web.url, f"{web.url}/", memory)):
        into = tmp_path / str(number)
        into.mkdir()
        origin = StoreSource().resolve(url, GO)
        StoreSource().fetch(origin, into, 4 * MIB, GO)
        assert files(into) == ADAPTER


def test_a_resolved_revision_is_the_content_s(web: Web) -> None:
    first = StoreSource().resolve(web.url, GO)
    assert StoreSource().resolve(web.url, GO) == first
    web.files["README.md"] = b"not a file of the adapter"
    assert StoreSource().resolve(web.url, GO) == first
    web.files["adapter_config.json"] = b'{"peft_type": "lora"}'
    assert StoreSource().resolve(web.url, GO) != first


def test_a_cut_connection_is_resumed_where_it_ended(web: Web, tmp_path: Path) -> None:
    origin = StoreSource().resolve(web.url, GO)
    web.cut_after = 1000
    web.got.clear()
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        StoreSource().fetch(origin, tmp_path, 4 * MIB, GO)
    assert (tmp_path / "adapter_model.safetensors.part").stat().st_size == MIB
    StoreSource().fetch(origin, tmp_path, 4 * MIB, GO)
    assert files(tmp_path) == ADAPTER
    ranges = [asked for path, asked in web.got if path == "adapter_model.safetensors"]
    assert ranges == [f"bytes={a}-{b}" for a, b in ((0, MIB - 1), (MIB, 2 * MIB - 1), (MIB, 2 * MIB - 1),
                                                    (2 * MIB, 3 * MIB - 1))]  # fmt: skip


def test_a_fetcher_gets_over_cuts_and_errors_by_itself(web: Web, tmp_path: Path) -> None:
    fetcher = Fetcher({ANY: StoreSource()}, DiskCache(tmp_path, 9 * MIB), 4 * MIB, backoff_s=0.01)
    web.faults = [503] * 4
    origin = fetcher.resolve(web.url, GO)
    web.cut_after = 0
    with fetcher.open(origin, GO) as lease:
        assert files(lease.path) == ADAPTER
    fetcher.cache.check_integrity()


def test_a_server_without_ranges_is_read_in_one_go(web: Web, tmp_path: Path) -> None:
    web.has_ranges = False
    (tmp_path / "adapter_model.safetensors.part").write_bytes(b"x" * 2000)
    StoreSource().fetch(StoreSource().resolve(web.url, GO), tmp_path, 4 * MIB, GO)
    assert files(tmp_path) == ADAPTER


def test_parts_of_another_revision_are_dropped(web: Web, tmp_path: Path) -> None:
    old = StoreSource().resolve(web.url, GO)
    web.cut_after = 0
    with pytest.raises(SourceUnavailable):
        StoreSource().fetch(old, tmp_path, 4 * MIB, GO)
    web.files["adapter_model.safetensors"] = new = b"y" * 3 * MIB
    StoreSource().fetch(StoreSource().resolve(web.url, GO), tmp_path, 4 * MIB, GO)
    assert files(tmp_path) == ADAPTER | {"adapter_model.safetensors": new}


def test_stop_ends_a_fetch_between_two_pieces(web: Web, tmp_path: Path) -> None:
    origin, stop = StoreSource().resolve(web.url, GO), threading.Event()
    web.before_get = lambda path: stop.set() if path.endswith("safetensors") else None
    with pytest.raises(LoadCancelled):
        StoreSource().fetch(origin, tmp_path, 4 * MIB, stop)
    assert (tmp_path / "adapter_model.safetensors.part").stat().st_size == MIB
    with pytest.raises(LoadCancelled):
        StoreSource().resolve(web.url, stop)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_source_that_changed_is_refused(web: Web, tmp_path: Path, when: str) -> None:
    origin = StoreSource().resolve(web.url, GO)

    def change(path: str = "safetensors") -> None:
        if path.endswith("safetensors"):
            web.files["adapter_model.safetensors"] = b"y" * 3 * MIB

    if when == "before":
        change()
    else:
        web.before_get = change
    assert refused(lambda: StoreSource().fetch(origin, tmp_path, 4 * MIB, GO)).code == "SOURCE_CHANGED"
    assert files(tmp_path) == {}


def test_a_store_is_listed_anew_each_time(memory: str, tmp_path: Path) -> None:
    origin = StoreSource().resolve(memory, GO)
    fsspec.filesystem("memory").pipe(f"{memory}/adapter_config.json", b"{}")
    assert refused(lambda: StoreSource().fetch(origin, tmp_path, 4 * MIB, GO)).code == "SOURCE_CHANGED"


def test_too_large_an_adapter_is_refused_before_it_is_downloaded(web: Web, tmp_path: Path) -> None:
    origin = StoreSource().resolve(web.url, GO)
    web.got.clear()
    assert refused(lambda: StoreSource().fetch(origin, tmp_path, 3 * MIB, GO)).code == "SOURCE_TOO_LARGE"
    assert not [path for path, _ in web.got if path in ADAPTER] and not files(tmp_path)


def test_a_named_adapter_in_a_sub_folder_is_fetched_with_it(tmp_path: Path) -> None:
    store, path = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    store.pipe(f"{path}/english/adapter_config.json", b"{}")
    store.pipe(f"{path}/english/deep/adapter_config.json", b"{}")
    StoreSource().fetch(StoreSource().resolve(f"memory:/{path}", GO), tmp_path, MIB, GO)
    assert files(tmp_path) == {"english/adapter_config.json": b"{}"}


def test_shards_are_found_by_their_index_on_a_web_server(web: Web, tmp_path: Path) -> None:
    shards = {f"adapter_model-0000{n}-of-00002.safetensors": bytes([n]) for n in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    web.files = {"adapter_config.json": b"{}", "adapter_model.safetensors.index.json": index, **shards}
    StoreSource().fetch(StoreSource().resolve(web.url, GO), tmp_path, MIB, GO)
    assert files(tmp_path) == web.files


@pytest.mark.parametrize("name", ["../adapter_config.json", "a/../../b.json", "/etc/passwd", "x\\..\\y.safetensors"])
def test_a_name_that_leads_out_of_the_folder_is_refused(web: Web, name: str) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    web.files["adapter_model.safetensors.index.json"] = index
    assert refused(lambda: StoreSource().resolve(web.url, GO)).code == "SOURCE_NAME"


def test_a_hostile_listing_is_refused(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    store = fsspec.filesystem("memory")
    path = memory.removeprefix("memory:/")
    listed = store.ls(path, detail=True)
    hostile = [*listed, {"name": f"{path}/../adapter_model.safetensors", "size": 1, "type": "file", "created": 1}]
    monkeypatch.setattr(type(store), "ls", lambda *_args, **_options: hostile)
    assert refused(lambda: StoreSource().resolve(memory, GO)).code == "SOURCE_NAME"


def test_a_pickle_is_refused_by_name(memory: str) -> None:
    fsspec.filesystem("memory").rm(f"{memory}/adapter_model.safetensors")
    error = refused(lambda: StoreSource().resolve(memory, GO))
    assert error.code == "PICKLE" and "adapter_model.bin" in error.message


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (403, AdapterRejected, "SOURCE_FORBIDDEN"),
        (401, AdapterRejected, "SOURCE_FORBIDDEN"),
        (404, AdapterRejected, "SOURCE_MISSING"),
        (500, SourceUnavailable, None),
        (503, SourceUnavailable, None),
        (429, SourceUnavailable, None),
    ],
)
def test_what_a_server_answers_becomes_an_error_of_the_tree(
    web: Web, status: int, kind: type[MultiloraError], code: str | None
) -> None:
    web.faults = [status] * 1000
    with pytest.raises(kind, match=re.escape(web.url)) as caught:
        StoreSource().resolve(web.url, GO)
    assert caught.value.metadata.get("code") == code


def test_a_signed_url_in_a_library_s_error_is_not_repeated(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError("GET https://signed.test/a?X-Amz-Signature=secret")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", fail)
    with pytest.raises(SourceUnavailable) as caught:
        StoreSource().resolve(memory, GO)
    assert "Signature" not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_not_there_may_come_back() -> None:
    with pytest.raises(SourceUnavailable, match="ConnectionRefusedError"):
        StoreSource().resolve("http://127.0.0.1:9/adapter", GO)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("gs://bucket/a", re.escape("pip install 'multilora[gs]'")),
        ("nonsense://a/b", "one that fsspec knows"),
        ("zip://a::s3://bucket/b.zip", "chains"),
        ("https://user:secret@host/a", "environment"),
        ("https://host/a?token=secret", "environment"),
        ("sftp://user:secret@host/a", "environment"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, url: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    error = refused(lambda: StoreSource().resolve(url, GO))
    assert error.code == "SOURCE_UNSUPPORTED" and re.search(remedy, error.message)
    assert "secret" not in f"{error}{error.metadata}"


def test_a_url_is_shown_without_credentials() -> None:
    assert shown_url("https://user:pw@host/a/b?sig=1#x") == "https://host/a/b"
    assert shown_url("hf://org/name@v1/sub") == "hf://org/name@v1/sub"
    assert shown_url("/srv/a?b@c") == "/srv/a?b@c"


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("url", ["hf://org/name", "hf://org/name@v2", f"hf://org/name@{COMMIT}"])
def test_the_hub_is_pinned_to_a_commit_and_fetched(web: Web, tmp_path: Path, url: str) -> None:
    source = HubSource(web.url)
    origin = source.resolve(url, GO)
    assert origin == Origin("hf://org/name", COMMIT)
    source.fetch(origin, tmp_path, 4 * MIB, GO)
    assert files(tmp_path) == ADAPTER
    web.got.clear()
    source.fetch(origin, tmp_path, 4 * MIB, GO)
    assert not [path for path, _ in web.got if "resolve" in path]  # what is there is not fetched again


@pytest.mark.usefixtures("online")
def test_a_sub_folder_of_a_repository_comes_without_its_name(web: Web, tmp_path: Path) -> None:
    web.files = {f"adapters/de/{name}": data for name, data in ADAPTER.items()} | {"config.json": b"{}"}
    source = HubSource(web.url)
    origin = source.resolve("hf://org/name@main/adapters/de/", GO)
    assert origin == Origin("hf://org/name/adapters/de", COMMIT)
    source.fetch(origin, tmp_path, 4 * MIB, GO)
    assert files(tmp_path) == ADAPTER
    error = refused(lambda: source.fetch(Origin("hf://org/name", COMMIT), tmp_path, 4 * MIB, GO))
    assert error.code == "SOURCE_MISSING" and "adapters/de" in error.message


@pytest.mark.usefixtures("online")
def test_the_hub_s_files_are_bounded_before_any_is_downloaded(web: Web, tmp_path: Path) -> None:
    error = refused(lambda: HubSource(web.url).fetch(Origin("hf://org/name", COMMIT), tmp_path, 3 * MIB, GO))
    assert error.code == "SOURCE_TOO_LARGE" and not files(tmp_path)
    assert not [path for path, _ in web.got if "resolve" in path]


@pytest.mark.usefixtures("online")
def test_stop_ends_a_download_from_the_hub(web: Web, tmp_path: Path) -> None:
    stop = threading.Event()
    web.before_get = lambda path: stop.set() if path.endswith("safetensors") else None
    with pytest.raises(LoadCancelled):
        HubSource(web.url).fetch(Origin("hf://org/name", COMMIT), tmp_path, 4 * MIB, stop)
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, AdapterRejected), (403, AdapterRejected), (404, AdapterRejected), (503, SourceUnavailable)],
)
def test_what_the_hub_answers_becomes_an_error_of_the_tree(web: Web, status: int, kind: type[MultiloraError]) -> None:
    web.faults = [status] * 100
    with pytest.raises(kind, match="hf://org/name"):
        HubSource(web.url).resolve("hf://org/name", GO)


@pytest.mark.parametrize("url", ["hf://name", "hf://org/name/../../x", "hf://org/name@", "hf://or g/name"])
def test_what_is_no_repository_is_refused(url: str) -> None:
    assert refused(lambda: HubSource().resolve(url, GO)).code in ("SOURCE_UNSUPPORTED", "SOURCE_NAME")


def test_the_hub_switched_off_says_so() -> None:
    assert "HF_HUB_OFFLINE" in refused(lambda: HubSource().resolve("hf://org/name", GO)).message
