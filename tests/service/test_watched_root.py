"""The watched adapter root: what operators copy to it, change in it and take from it, without a restart."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import grpc
import pytest

from lora_runtime.adapters.sources.fetch import Fetcher
from lora_runtime.adapters.sources.scan import scan_root
from lora_runtime.errors import SourceUnavailable
from server.control.watcher import RootWatcher
from server.pb.multilora.v1 import adapters_pb2 as pb
from tests.oracle import make_adapter
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, failure_of, running

LABELS = ["a", "b"]


@dataclass
class Watched:
    """A server, its root, and the watcher that looks when it is told to."""

    server: Harness
    root: Path
    watcher: RootWatcher

    async def look(self, times: int = 2) -> None:
        """Twice is once to see files and once to see that they have stopped changing."""
        for _ in range(times):
            await self.watcher.look()

    async def get(self, adapter: str) -> pb.Adapter:
        return (await self.server.adapters.GetAdapter(pb.GetAdapterRequest(adapter=adapter))).adapter

    async def is_registered(self, adapter: str) -> bool:
        page = await self.server.adapters.ListAdapters(pb.ListAdaptersRequest(tenant="-"))
        return f"tenants/{adapter}" in [known.name for known in page.adapters]

    async def answers(self, adapter: str) -> int:
        return (await self.server.inference.Classify(classify_request(adapter, "text"))).version

    async def move(self, alias: str, version: int, **fields: Any) -> None:
        request = pb.SetAliasRequest(adapter="news", alias=alias, version=version, **fields)
        await self.server.adapters.SetAlias(request)


def watch(server: Harness, root: Path | str) -> Watched:
    return Watched(server, Path(root), RootWatcher(server.app._control.plane, str(root), scan_root(str(root))))


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncGenerator[Watched]:
    """Over `news` 1 and 2, and `garbled`, which is refused."""
    root = tmp_path / "adapters"
    for version in ("1", "2"):
        write_adapter(root / "news" / version, labels=LABELS)
    write_adapter(root / "garbled")
    (root / "garbled" / "adapter_config.json").write_text("{not json")
    async with running(root, watch_seconds=0, state=tmp_path / "state") as server:
        yield watch(server, root)


def change(folder: Path, **config: object) -> None:
    """Write its config anew, at another time than before, however coarse the disk's clock is."""
    path = folder / "adapter_config.json"
    later = path.stat().st_mtime_ns + 1_000_000_000
    path.write_text(json.dumps(config))
    os.utime(path, ns=(later, later))


async def test_a_folder_that_appears_is_registered_once_its_files_have_stopped_changing(watched: Watched) -> None:
    write_adapter(watched.root / "spam", labels=LABELS)
    write_adapter(watched.root / "acme" / "tickets" / "3", labels=LABELS)
    await watched.look(1)
    change(watched.root / "spam", labels=["x", "y", "z"])
    await watched.look(1)
    assert not await watched.is_registered("default/adapters/spam/versions/1")
    assert await watched.is_registered("acme/adapters/tickets/versions/3")
    await watched.look(1)
    spam = await watched.get("spam")
    assert (spam.state, list(spam.labels), spam.source) == (pb.ADAPTER_STATE_REGISTERED, ["x", "y", "z"], "spam")
    assert (await watched.get("acme/tickets")).source == "acme/tickets/3"
    assert await watched.answers("spam") == 1
    assert await watched.answers("acme/tickets") == 3


async def test_a_file_that_arrives_late_is_waited_for(watched: Watched) -> None:
    folder = write_adapter(watched.root / "spam", labels=LABELS)
    for size in range(3):
        (folder / "adapter_model.safetensors").write_bytes(bytes(size))
        await watched.look(1)
        assert not await watched.is_registered("default/adapters/spam/versions/1")
    await watched.look(1)
    assert await watched.is_registered("default/adapters/spam/versions/1")


async def test_a_folder_that_is_gone_is_forgotten_and_the_others_stay(watched: Watched) -> None:
    shutil.rmtree(watched.root / "news" / "2")
    await watched.look(1)
    assert (await failure_of(watched.get("news@2"))).code is grpc.StatusCode.NOT_FOUND
    assert await watched.answers("news") == 1
    assert await watched.is_registered("default/adapters/garbled/versions/1")
    shutil.rmtree(watched.root / "news")
    await watched.look(1)
    assert (await failure_of(watched.answers("news"))).code is grpc.StatusCode.NOT_FOUND


async def test_a_folder_that_comes_back_has_its_aliases_and_its_pin_again(watched: Watched) -> None:
    await watched.move("prod", 2)
    await watched.move("default", 2)
    await watched.server.adapters.PinAdapter(pb.PinAdapterRequest(adapter="news@2", pinned=True))
    (watched.root / "news" / "2").rename(watched.root.parent / "away")
    await watched.look()
    assert await watched.answers("news") == 1
    assert (await failure_of(watched.answers("news@prod"))).code is grpc.StatusCode.NOT_FOUND
    (watched.root.parent / "away").rename(watched.root / "news" / "2")
    await watched.look()
    assert await watched.answers("news@prod") == await watched.answers("news") == 2
    assert (await watched.get("news@2")).pinned


async def test_a_registration_does_not_move_the_default_whose_folder_is_away(watched: Watched) -> None:
    (watched.root / "news" / "1").rename(watched.root.parent / "away")
    await watched.look()
    assert await watched.answers("news") == 2
    request = pb.RegisterAdapterRequest(name="news", source="news/2")
    assert (await watched.server.adapters.RegisterAdapter(request)).adapter.version == 3
    (watched.root.parent / "away").rename(watched.root / "news" / "1")
    await watched.look()
    assert await watched.answers("news") == 1


async def test_a_weighted_alias_keeps_the_version_whose_folder_is_there(watched: Watched) -> None:
    await watched.move("prod", 1, canary_version=2, canary_percent=50)
    await watched.move("default", 1, canary_version=2, canary_percent=50)
    away = watched.root.parent / "away"
    for gone, left in ((2, 1), (1, 2)):
        (watched.root / "news" / str(gone)).rename(away)
        await watched.look()
        for reference in ("news", "news@prod"):
            assert {await watched.answers(reference) for _ in range(8)} == {left}
        away.rename(watched.root / "news" / str(gone))
        await watched.look()
    drawn = await asyncio.gather(*(watched.answers("news@prod") for _ in range(30)))
    assert set(drawn) == {1, 2}


async def test_a_refused_folder_that_is_mended_may_be_used(watched: Watched) -> None:
    write_adapter(watched.root / "late")
    (watched.root / "late" / "adapter_config.json").write_text("{")
    await watched.look()
    for name in ("garbled", "late"):
        refused = await watched.get(name)
        assert (refused.state, refused.failure.reason) == (pb.ADAPTER_STATE_FAILED, "ADAPTER_REJECTED")
        change(watched.root / name, labels=LABELS)
    await watched.look(1)
    assert (await watched.get("late")).state == pb.ADAPTER_STATE_FAILED
    await watched.look(1)
    for name in ("garbled", "late"):
        mended = await watched.get(name)
        assert (mended.state, mended.HasField("failure")) == (pb.ADAPTER_STATE_REGISTERED, False)
        assert await watched.answers(name) == 1


async def test_files_that_change_before_the_first_load_are_read_again(watched: Watched) -> None:
    change(watched.root / "news" / "1", labels=["x", "y", "z"])
    await watched.look()
    assert list((await watched.get("news@1")).labels) == ["x", "y", "z"]


async def test_files_of_a_loaded_version_that_change_are_reported_and_not_taken(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    await watched.server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="news", wait=True))
    before = await watched.get("news")
    change(watched.root / "news" / "1", labels=["x", "y", "z"])
    await watched.look(4)
    assert await watched.get("news") == before
    warnings = [record.getMessage() for record in caplog.records if "immutable" in record.getMessage()]
    assert warnings == ["the files of adapter default/news@1 changed; a version is immutable, add another"]


async def test_a_root_that_cannot_be_read_keeps_everything(watched: Watched) -> None:
    watched.root.rename(watched.root.parent / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            await watched.look(1)
    assert await watched.is_registered("default/adapters/news/versions/1")
    (watched.root.parent / "away").rename(watched.root)
    write_adapter(watched.root / "spam", labels=LABELS)
    await watched.look()
    assert await watched.answers("news") == await watched.answers("spam") == 1


async def test_what_a_client_deleted_stays_deleted_until_its_files_change(watched: Watched) -> None:
    await watched.server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="news@2"))
    await watched.look(3)
    assert not await watched.is_registered("default/adapters/news/versions/2")
    change(watched.root / "news" / "2", labels=LABELS)
    await watched.look()
    assert await watched.answers("news@2") == 2
    await watched.server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="news@2"))
    shutil.rmtree(watched.root / "news" / "2")
    await watched.look()
    write_adapter(watched.root / "news" / "2", labels=LABELS)
    await watched.look()
    assert await watched.answers("news@2") == 2


async def test_a_folder_does_not_touch_what_a_client_registered_as_that_version(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(watched.root / "more" / "here now" / "x", labels=["x", "y", "z"])
    request = pb.RegisterAdapterRequest(name="spam", source="more/here now/x")
    registered = (await watched.server.adapters.RegisterAdapter(request)).adapter
    write_adapter(watched.root / "spam", labels=LABELS)
    await watched.look()
    assert "that version is taken" in caplog.text
    assert await watched.get("spam") == registered
    change(watched.root / "spam", labels=["other", "labels"])
    await watched.look()
    assert await watched.get("spam") == registered
    shutil.rmtree(watched.root / "spam")
    await watched.look()
    assert await watched.get("spam") == registered


async def test_a_client_that_was_faster_registers_the_folder_itself(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(watched.root / "news" / "3", labels=LABELS)
    await watched.server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="news", source="news/3"))
    await watched.look()
    assert "taken" not in caplog.text
    assert await watched.answers("news@3") == 3


async def test_a_root_that_is_written_in_another_way_is_the_same_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "adapters" / "news" / "1", labels=LABELS)
    (tmp_path / "link").symlink_to(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    for written in ("adapters", "./link", "../" + tmp_path.name + "/adapters"):
        async with running(Path(written), watch_seconds=0) as server:
            watched = watch(server, Path(written))
            assert (await watched.get("news")).source == "news/1", written
            request = pb.RegisterAdapterRequest(name="copy", source="news/1")
            assert (await server.adapters.RegisterAdapter(request)).adapter.source == "news/1", written


async def test_the_watcher_runs_by_itself(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "news", labels=LABELS)
    async with running(root, watch_seconds=0.01) as server:
        root.rename(tmp_path / "away")
        await asyncio.sleep(0.05)
        (tmp_path / "away").rename(root)
        write_adapter(root / "spam", labels=LABELS)
        async with asyncio.timeout(5):
            while await server.sample('multilora_adapters{state="REGISTERED"}') != 2:
                await asyncio.sleep(0.01)


async def test_a_refused_folder_that_is_mended_may_be_used_in_the_real_runtime(tmp_path: Path, tiny_bert: Path) -> None:
    root = tmp_path / "adapters"
    folder = make_adapter(tiny_bert, root / "news")
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text("{")
    async with running(root, base=str(tiny_bert), real=True, threads=1, watch_seconds=0) as server:
        watched = watch(server, root)
        assert (await watched.get("news")).state == pb.ADAPTER_STATE_FAILED
        (folder / "adapter_config.json").write_text(config)
        await watched.look()
        assert (await watched.get("news")).state == pb.ADAPTER_STATE_REGISTERED
        assert await watched.answers("news") == 1


def out_of_reach(*_: object) -> None:
    raise SourceUnavailable("memory://", "is out of reach")


async def test_a_store_is_a_root_like_a_folder(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, root = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"

    def put(name: str, seed: int, **files: bytes) -> None:
        folder = make_adapter(tiny_bert, tmp_path / f"{name}-{seed}", seed=seed)
        for path in folder.iterdir():
            store.pipe(f"/{tmp_path.name}/{name}/{path.name}", files.get(path.stem, path.read_bytes()))

    put("news/1", 0)
    put("broken/1", 0, adapter_config=b"{")
    async with running(root, base=str(tiny_bert), real=True, threads=1, watch_seconds=0) as server:
        watched = watch(server, root)
        assert await watched.answers("news") == 1
        assert (await failure_of(watched.answers("broken"))).code is grpc.StatusCode.FAILED_PRECONDITION
        put("acme/tickets/3", 1)
        await watched.look()
        put("acme/tickets/3", 2)  # before it is loaded: what was pinned is not there any more
        put("broken/1", 3)
        await watched.look()
        assert await watched.answers("acme/tickets") == 3
        assert await watched.answers("broken") == 1
        put("late/1", 5)
        with monkeypatch.context() as patch:
            patch.setattr(Fetcher, "resolve", out_of_reach)
            await watched.look()
        await watched.look()
        assert await watched.answers("late") == 1
        put("news/1", 4)
        await watched.look()
        assert await watched.answers("news") == 1
        store.rm(f"/{tmp_path.name}/news", recursive=True)
        await watched.look()
        assert (await failure_of(watched.answers("news"))).code is grpc.StatusCode.NOT_FOUND


async def test_a_folder_that_can_be_read_in_two_ways_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "acme" / "tickets", labels=LABELS)
    async with running(root, watch_seconds=0) as server:
        assert sum("acme/tickets/1/" in message for message in caplog.messages) == 1
        watched = watch(server, root)
        await watched.look()
        assert sum("ambiguous" in message for message in caplog.messages) == 1
        write_adapter(root / "bolt" / "tickets", labels=LABELS)
        await watched.look()
    assert sum("bolt/tickets/1/" in message for message in caplog.messages) == 1
