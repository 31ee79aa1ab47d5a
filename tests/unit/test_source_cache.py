"""Adapters are fetched once, kept under a budget, found again, and given up when nobody wants them."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.sources.cache import DiskCache
from lora_runtime.adapters.sources.fetch import ANY, LOCAL, Fetcher, Lease, cache_key, default_fetcher
from lora_runtime.adapters.sources.local import LocalSource
from lora_runtime.errors import AdapterRejected, LoadCancelled, SourceUnavailable

GO = threading.Event()  # never set


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def fill(cache: DiskCache, name: str, num_bytes: int = 100) -> Path:
    (cache.begin(key(name)) / "file").write_bytes(bytes(num_bytes))
    path = cache.publish(key(name))
    cache.check_integrity()
    return path


class FakeSource:
    """Writes one file per fetch; its first faults are raised instead."""

    def __init__(self, num_bytes: int = 100, seconds: float = 0.0, faults: list[Exception] | None = None) -> None:
        self.num_bytes, self.seconds, self.faults = num_bytes, seconds, faults or []
        self.started = threading.Event()
        self.num_fetches = self.num_resolves = 0
        self.found: list[list[str]] = []  # what lay in the folder when a fetch began

    def resolve(self, url: str, stop: threading.Event) -> Origin:
        del stop
        self.num_resolves += 1
        if self.faults:
            raise self.faults.pop(0)
        return Origin(url, "r1")

    def fetch(self, origin: Origin, into: Path, max_bytes: int, stop: threading.Event) -> None:
        del max_bytes
        self.num_fetches += 1
        self.found.append(sorted(path.name for path in into.iterdir()))
        (into / "begun").write_bytes(b"x")
        self.started.set()
        if stop.wait(self.seconds) if self.seconds else stop.is_set():
            raise LoadCancelled(origin.url)
        if self.faults:
            raise self.faults.pop(0)
        (into / "begun").unlink()
        (into / "file").write_bytes(bytes(self.num_bytes))


def make_fetcher(root: Path, source: FakeSource, num_bytes: int = 1000) -> Fetcher:
    return Fetcher(
        {LOCAL: LocalSource(), "file": LocalSource(), ANY: source}, DiskCache(root, num_bytes), 1 << 20, backoff_s=0.01
    )


def origin(name: str = "a") -> Origin:
    return Origin(f"s3://bucket/{name}", "r1")


def test_the_least_recently_used_is_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 300)
    for name in "abc":
        fill(cache, name)
        cache.release(key(name))
    assert cache.acquire(key("a")) is not None
    cache.release(key("a"))
    path = fill(cache, "d")
    assert path.is_dir() and cache.used_bytes == 300
    assert [cache.bytes_of(key(name)) for name in "abcd"] == [100, 0, 100, 100]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(map(key, "acd"))


def test_what_is_leased_is_not_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 250)
    held = [fill(cache, name) for name in "abc"]
    assert all(path.is_dir() for path in held)
    assert cache.remove(key("a")) == 0
    cache.release(key("b"))
    cache.check_integrity()
    assert [path.is_dir() for path in held] == [True, False, True]
    cache.release(key("a"))
    assert cache.remove(key("a")) == 100
    assert cache.remove(key("a")) == 0
    cache.check_integrity()


def test_a_restart_finds_complete_folders_and_their_order(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    for number, name in enumerate("abc"):
        fill(cache, name)
        cache.release(key(name))
        os.utime(tmp_path / key(name), (number, number))
    cache.acquire(key("a"))
    (cache.begin(key("half")) / "file").write_bytes(bytes(50))  # the process ends here
    (tmp_path / f"{key('x')}.1.gone").mkdir()
    (tmp_path / "notes.txt").write_text("not ours")

    again = DiskCache(tmp_path, 300)
    again.check_integrity()
    assert [again.bytes_of(key(name)) for name in ("a", "b", "c", "half")] == [100, 100, 100, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*map(key, "abc"), "notes.txt"])
    fill(again, "d")
    assert [again.bytes_of(key(name)) for name in "abcd"] == [100, 0, 100, 100]


def test_a_part_is_kept_for_the_next_fetch_while_there_is_room(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 300)
    (cache.begin(key("a")) / "file.part").write_bytes(bytes(200))
    cache.abandon(key("a"))
    cache.check_integrity()
    again = DiskCache(tmp_path, 300)
    assert again.used_bytes == 200
    assert (again.begin(key("a")) / "file.part").stat().st_size == 200
    again.abandon(key("a"))
    fill(again, "b", 150)
    assert again.used_bytes == 150
    assert not (again.begin(key("a")) / "file.part").exists()
    again.abandon(key("a"))
    again.check_integrity()


def test_a_cache_emptied_by_hand_fetches_again(tmp_path: Path) -> None:
    source = FakeSource()
    fetcher = make_fetcher(tmp_path / "cache", source)
    lease = fetcher.open(origin(), GO)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    again = fetcher.open(origin(), GO)
    assert (again.path / "file").is_file() and source.num_fetches == 2
    lease.release()
    again.release()
    fetcher.cache.check_integrity()
    assert fetcher.evict(origin()) == 100


def test_a_folder_that_is_not_in_the_books_is_not_trusted(tmp_path: Path) -> None:
    fetcher = make_fetcher(tmp_path, FakeSource())
    (tmp_path / cache_key(origin())).mkdir()
    (tmp_path / cache_key(origin()) / "strange").touch()
    with fetcher.open(origin(), GO) as lease:
        assert [path.name for path in lease.path.iterdir()] == ["file"]
    fetcher.cache.check_integrity()


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    fetcher = make_fetcher(tmp_path / "cache", FakeSource())
    for url in (str(tmp_path / "adapter"), f"file://{tmp_path / 'adapter'}"):
        found = fetcher.resolve(url, GO)
        assert found == Origin(str(tmp_path / "adapter"), None)
        with fetcher.open(found, GO) as lease:
            assert (lease.path, lease.num_bytes) == (tmp_path / "adapter", 0)
        assert fetcher.cached_bytes(found) == fetcher.evict(found) == 0
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize(("name", "text"), [("none", "there is none of that name"), ("file", "is a file")])
def test_a_local_path_that_is_no_folder_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterRejected, match=text) as refused:
        default_fetcher(tmp_path / "cache", 1000, 1000).resolve(str(tmp_path / name), GO)
    assert refused.value.code == "FOLDER_MISSING"


def test_a_lease_counts_once(tmp_path: Path) -> None:
    fetcher = make_fetcher(tmp_path, FakeSource())
    first, second = fetcher.open(origin(), GO), fetcher.open(origin(), GO)
    assert first.path == second.path and first.num_bytes == 100
    first.release()
    first.release()
    assert fetcher.evict(origin()) == 0
    second.release()
    assert fetcher.cached_bytes(origin()) == fetcher.evict(origin()) == 100
    assert not second.path.exists()


def test_a_hundred_callers_fetch_once(tmp_path: Path) -> None:
    source = FakeSource(seconds=0.2)
    fetcher = make_fetcher(tmp_path, source)
    with ThreadPoolExecutor(100) as pool:
        leases = list(pool.map(lambda _: fetcher.open(origin(), threading.Event()), range(100)))
    assert source.num_fetches == 1
    assert {lease.path for lease in leases} == {tmp_path / cache_key(origin())}
    for lease in leases:
        lease.release()
    fetcher.cache.check_integrity()
    assert fetcher.evict(origin()) == 100


def test_when_the_first_caller_gives_up_another_carries_on(tmp_path: Path) -> None:
    source = FakeSource(seconds=0.3)
    fetcher = make_fetcher(tmp_path, source)
    stop = threading.Event()
    with ThreadPoolExecutor(11) as pool:
        first = pool.submit(fetcher.open, origin(), stop)
        source.started.wait(5)
        others = [pool.submit(fetcher.open, origin(), threading.Event()) for _ in range(10)]
        time.sleep(0.05)
        stop.set()
        with pytest.raises(LoadCancelled):
            first.result(5)
        leases: list[Lease] = [other.result(5) for other in others]
    assert source.num_fetches == 2
    assert source.found == [[], ["begun"]]  # the second resumed what the first left
    assert all((lease.path / "file").is_file() for lease in leases)


def test_a_waiting_caller_can_give_up_alone(tmp_path: Path) -> None:
    source = FakeSource(seconds=0.5)
    fetcher = make_fetcher(tmp_path, source)
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetcher.open, origin(), threading.Event())
        source.started.wait(5)
        second = pool.submit(fetcher.open, origin(), stop)
        time.sleep(0.05)
        stop.set()
        with pytest.raises(LoadCancelled):
            second.result(0.4)
        assert first.result(5).num_bytes == 100


def test_a_refusal_reaches_all_who_wait_and_the_next_may_try(tmp_path: Path) -> None:
    source = FakeSource(seconds=0.2, faults=[AdapterRejected("SOURCE_CHANGED", "s3://bucket/a", "changed")])
    fetcher = make_fetcher(tmp_path, source)
    with ThreadPoolExecutor(5) as pool:
        opened = [pool.submit(fetcher.open, origin(), threading.Event()) for _ in range(5)]
        refused = [isinstance(future.exception(5), AdapterRejected) for future in opened]
    assert all(refused) and source.num_fetches == 1
    fetcher.open(origin(), GO).release()


def test_a_store_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    source = FakeSource(faults=[SourceUnavailable("s3://bucket", "answered 503") for _ in range(3)])
    fetcher = make_fetcher(tmp_path, source)
    fetcher.open(origin(), GO).release()
    assert source.num_fetches == 4


def test_a_store_that_stays_away_is_given_up(tmp_path: Path) -> None:
    source = FakeSource(faults=[SourceUnavailable("s3://bucket", "answered 503") for _ in range(9)])
    fetcher = make_fetcher(tmp_path, source)
    with pytest.raises(SourceUnavailable, match="answered 503"):
        fetcher.resolve("s3://bucket/a", GO)
    assert source.num_resolves == 4


def test_a_refusal_is_not_tried_again(tmp_path: Path) -> None:
    source = FakeSource(faults=[AdapterRejected("SOURCE_MISSING", "s3://bucket/a", "is not there")])
    with pytest.raises(AdapterRejected):
        make_fetcher(tmp_path, source).open(origin(), GO)
    assert source.num_fetches == 1


def test_the_wait_before_a_retry_ends_with_stop(tmp_path: Path) -> None:
    source = FakeSource(faults=[SourceUnavailable("s3://bucket", "answered 503") for _ in range(9)])
    fetcher = Fetcher({ANY: source}, DiskCache(tmp_path, 1000), 1000, backoff_s=60)
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(LoadCancelled):
        fetcher.open(origin(), stop)
    assert time.monotonic() - begin < 5


def test_a_full_disk_names_the_flag_and_is_tried_again(tmp_path: Path) -> None:
    source = FakeSource(faults=[OSError(errno.ENOSPC, "No space left on device") for _ in range(5)])
    fetcher = make_fetcher(tmp_path, source)
    with pytest.raises(SourceUnavailable, match="--cache-mib"):
        fetcher.open(origin(), GO)
    assert source.num_fetches == 4
    source.faults.clear()
    fetcher.open(origin(), GO).release()
    fetcher.cache.check_integrity()


def test_an_unknown_scheme_without_a_source_is_refused(tmp_path: Path) -> None:
    fetcher = Fetcher({LOCAL: LocalSource()}, DiskCache(tmp_path, 1000), 1000)
    with pytest.raises(AdapterRejected, match="no source of this scheme"):
        fetcher.resolve("s3://user:secret@bucket/a", GO)


def test_many_threads_over_a_small_cache_leave_the_books_right(tmp_path: Path) -> None:
    source = FakeSource()
    fetcher = make_fetcher(tmp_path, source, num_bytes=350)

    def use(number: int) -> None:
        with fetcher.open(origin(str(number % 7)), threading.Event()) as lease:
            assert (lease.path / "file").stat().st_size == 100
        if number % 5 == 0:
            fetcher.evict(origin(str(number % 7)))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(200)))
    fetcher.cache.check_integrity()
    assert fetcher.cache.used_bytes <= 350
