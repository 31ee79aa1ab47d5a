"""Adapters in S3, against a server of its protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from lora_runtime.adapters.sources.fetch import Fetcher, default_fetcher
from lora_runtime.adapters.sources.scan import scan_root
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterId

GO = threading.Event()  # never set
MIB = 1 << 20
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 4096 * 2 + b"end"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = s3fs.S3FileSystem(use_listings_cache=False)
    if store.exists("adapters"):
        store.rm("adapters", recursive=True)
    store.mkdir("adapters")
    for path in ("flat", "acme/tickets/2"):
        for name, data in FILES.items():
            store.pipe(f"adapters/{path}/{name}", data)
    store.pipe("adapters/flat/optimizer.pt", b"not a file of the adapter")
    return store


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return default_fetcher(tmp_path, 8 * MIB, 4 * MIB)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("bucket")
def test_an_adapter_is_fetched_once_and_evicted(fetcher: Fetcher) -> None:
    origin = fetcher.resolve("s3://adapters/flat/", GO)
    assert origin == fetcher.resolve("s3://adapters/flat", GO)
    with fetcher.open(origin, GO) as lease:
        assert files(lease.path) == FILES
    size = sum(map(len, FILES.values()))
    assert fetcher.cached_bytes(origin) == size and fetcher.evict(origin) == size
    fetcher.cache.check_integrity()


def test_an_object_that_is_replaced_is_noticed(bucket: s3fs.S3FileSystem, fetcher: Fetcher) -> None:
    origin = fetcher.resolve("s3://adapters/flat", GO)
    bucket.pipe("adapters/flat/adapter_config.json", b"[]")
    with pytest.raises(AdapterRejected) as refused:
        fetcher.open(origin, GO)
    assert refused.value.code == "SOURCE_CHANGED"
    with fetcher.open(fetcher.resolve("s3://adapters/flat", GO), GO) as lease:
        assert (lease.path / "adapter_config.json").read_bytes() == b"[]"


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("url", ["s3://nowhere/flat", "s3://adapters/none", "s3://adapters/acme"])
def test_what_is_not_there_is_refused(fetcher: Fetcher, url: str) -> None:
    with pytest.raises(AdapterRejected) as refused:
        fetcher.resolve(url, GO)
    assert refused.value.code == "SOURCE_MISSING" and url in refused.value.message


def test_a_bucket_is_scanned(bucket: s3fs.S3FileSystem) -> None:
    scan = scan_root("s3://adapters")
    assert set(scan.found) == {AdapterId("default", "flat", 1), AdapterId("acme", "tickets", 2)}
    found = scan.found[AdapterId("acme", "tickets", 2)]
    assert found.url == "s3://adapters/acme/tickets/2" and not scan.skipped
    bucket.pipe("adapters/acme/tickets/2/adapter_config.json", b"[]")
    bucket.rm("adapters/flat", recursive=True)
    again = scan_root("s3://adapters/")
    assert set(again.found) == {AdapterId("acme", "tickets", 2)}
    assert again.found[AdapterId("acme", "tickets", 2)].signature != found.signature


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_no_empty_root() -> None:
    with pytest.raises(AdapterRejected) as refused:
        scan_root("s3://nowhere")
    assert refused.value.code == "SOURCE_MISSING"
