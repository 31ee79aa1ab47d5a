"""Which adapters a scan finds under a root, and what it says of the rest."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from lora_runtime.adapters.sources.scan import scan_root
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterId

FILES = ("adapter_config.json", "adapter_model.safetensors", "multilora.json")


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


def ids(root: Path) -> list[str]:
    scan = scan_root(str(root))
    assert not scan.skipped
    return sorted(map(str, scan.found))


def test_all_layouts_are_found_together(tmp_path: Path) -> None:
    make(tmp_path / "flat")
    make(tmp_path / "named" / "english")
    make(tmp_path / "many" / "3")
    make(tmp_path / "many" / "12")
    make(tmp_path / "acme" / "tickets" / "1")
    make(tmp_path / "acme" / "tickets" / "2" / "english")
    make(tmp_path / "acme" / "7" / "4")
    assert ids(tmp_path) == [
        "acme/7@4", "acme/tickets@1", "acme/tickets@2", "default/flat@1", "default/many@12", "default/many@3",
        "default/named@1",
    ]  # fmt: skip


def test_a_folder_that_may_be_a_tenants_adapter_without_a_version_is_told(tmp_path: Path) -> None:
    make(tmp_path / "flat")
    make(tmp_path / "acme" / "tickets")
    make(tmp_path / "sure" / "1" / "english")
    make(tmp_path / "bolt" / "tickets" / "1")
    make(tmp_path / "base" / "english")
    scan = scan_root(str(tmp_path))
    assert AdapterId("default", "acme", 1) in scan.found
    assert list(scan.doubtful) == ["acme"]
    for part in ("acme/tickets is read as default/acme@1", "adapter tickets of tenant acme", "acme/tickets/1/"):
        assert part in scan.doubtful["acme"]


def test_the_url_is_the_folder_of_the_version(tmp_path: Path) -> None:
    make(tmp_path / "acme" / "tickets" / "2" / "english")
    found = scan_root(f"{tmp_path}/").found[AdapterId("acme", "tickets", 2)]
    assert found.url == str(tmp_path / "acme" / "tickets" / "2")
    assert scan_root(f"file://{tmp_path}").found[AdapterId("acme", "tickets", 2)] == found


def test_files_and_hidden_folders_are_ignored_silently(tmp_path: Path) -> None:
    make(tmp_path / ".trash")
    make(tmp_path / "a" / ".cache")
    make(tmp_path / "a")
    (tmp_path / "README.md").write_text("adapters of the support team")
    assert ids(tmp_path) == ["default/a@1"]


def test_an_adapter_is_not_looked_into(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "a" / "checkpoint-100")
    make(tmp_path / "a" / "2")
    assert ids(tmp_path) == ["default/a@1"]


@pytest.mark.parametrize(
    ("path", "skipped", "reason"),
    [
        ("base", "base", "reserved"),
        ("acme/base/1", "acme/base/1", "reserved"),
        ("my notes", "my notes", "not a name"),
        ("acme/a b/1", "acme/a b", "not a name"),
        ("a/0", "a/0", "positive integer"),
        ("a/007", "a/007", "positive integer"),
        ("acme/a/12345678901", "acme/a/12345678901", "positive integer"),
        ("acme/a/v1", "acme", "adapter_config.json"),
    ],
)
def test_what_is_no_adapter_is_skipped_with_a_reason(tmp_path: Path, path: str, skipped: str, reason: str) -> None:
    make(tmp_path / path)
    make(tmp_path / "good")
    scan = scan_root(str(tmp_path))
    assert list(scan.found) == [AdapterId("default", "good", 1)]
    assert list(scan.skipped) == [skipped]
    assert reason in scan.skipped[skipped]


def test_two_named_adapters_in_one_folder_are_skipped(tmp_path: Path) -> None:
    make(tmp_path / "a" / "x")
    make(tmp_path / "a" / "y")
    make(tmp_path / "b" / "1" / "x")
    make(tmp_path / "b" / "1" / "y")
    scan = scan_root(str(tmp_path))
    assert not scan.found
    assert set(scan.skipped) == {"a", "b/1"}
    assert all("2 adapters in sub-folders (x, y)" in reason for reason in scan.skipped.values())


def test_an_adapter_of_a_tenant_needs_a_version(tmp_path: Path) -> None:
    make(tmp_path / "acme" / "new" / "1")
    make(tmp_path / "acme" / "old")
    make(tmp_path / "acme" / "half" / "v1")
    scan = scan_root(str(tmp_path))
    assert list(scan.found) == [AdapterId("acme", "new", 1)]
    assert set(scan.skipped) == {"acme/old", "acme/half"}
    assert "called 1" in scan.skipped["acme/old"]


def test_two_folders_of_one_adapter_are_not_both_taken(tmp_path: Path) -> None:
    make(tmp_path / "default" / "a" / "1")
    make(tmp_path / "a")
    scan = scan_root(str(tmp_path))
    assert list(scan.found) == [AdapterId("default", "a", 1)]
    assert "take one of them away" in "".join(scan.skipped.values())


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere" / "a")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere" / "a")
    assert ids(tmp_path / "root") == ["default/linked@1"]


def test_a_loop_of_links_is_skipped(tmp_path: Path) -> None:
    for version in range(1, 30):
        make(tmp_path / "acme" / "a" / str(version))
        (tmp_path / f"{version}").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "acme" / "b").mkdir()
    (tmp_path / "acme" / "b" / "1").symlink_to(tmp_path / "acme")
    begin = time.monotonic()
    scan = scan_root(str(tmp_path))
    assert time.monotonic() - begin < 2
    assert len(scan.found) == 29
    assert "lies in" in scan.skipped["7"] and "lies in" in scan.skipped["acme/b/1"]
    assert "cannot be read" in scan.skipped["itself"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_skipped(tmp_path: Path) -> None:
    make(tmp_path / "a").chmod(0)
    make(tmp_path / "b")
    scan = scan_root(str(tmp_path))
    (tmp_path / "a").chmod(0o700)
    assert list(scan.found) == [AdapterId("default", "b", 1)]
    assert "Permission denied" in scan.skipped["a"]


def test_a_link_to_nothing_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nothing")
    assert "No such file" in scan_root(str(tmp_path)).skipped["a"]


def test_a_root_that_cannot_be_read_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan_root(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        scan_root(str(tmp_path / "file"))


@pytest.mark.parametrize("where", ["a", "a/english"])
def test_the_signature_changes_with_a_file(tmp_path: Path, where: str) -> None:
    folder = make(tmp_path / where)
    make(tmp_path / where, "1_Pooling/config.json")

    def signature() -> str:
        return scan_root(str(tmp_path)).found[AdapterId("default", "a", 1)].signature

    before = signature()
    assert signature() == before
    os.utime(folder / FILES[1], ns=(1, 1))
    touched = signature()
    (folder / "multilora.json").unlink()
    removed = signature()
    os.utime(folder / "1_Pooling" / "config.json", ns=(1, 1))
    pooled = signature()
    assert len({before, touched, removed, pooled}) == 4


@pytest.mark.slow
def test_ten_thousand_folders_are_scanned_at_once(tmp_path: Path) -> None:
    root, file = tmp_path / "root", tmp_path / "file"
    root.mkdir()
    file.touch()
    for number in range(10_000):
        folder = f"{root}/a{number}"
        os.mkdir(folder)
        for name in FILES:
            os.link(file, f"{folder}/{name}")  # to the scan a file as any other, and faster to make
    seconds: list[float] = []
    for _ in range(3):  # the best of three: the machine may be busy
        begin = time.perf_counter()
        scan = scan_root(str(root))
        seconds.append(time.perf_counter() - begin)
        assert len(scan.found) == 10_000 and not scan.skipped
    assert min(seconds) < 1.5


def test_a_store_is_scanned_by_its_listing() -> None:
    store, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for path in ("acme/a/1/adapter_config.json", "b/adapter_config.json", ".x/adapter_config.json", "c/README.md"):
        store.pipe(f"{root}/{path}", b"{}")
    scan = scan_root(f"memory:/{root}/")
    assert set(scan.found) == {AdapterId("acme", "a", 1), AdapterId("default", "b", 1)}
    assert list(scan.skipped) == ["c"]
    found = scan.found[AdapterId("acme", "a", 1)]
    assert found.url == f"memory:/{root}/acme/a/1"
    store.pipe(f"{root}/acme/a/1/adapter_config.json", b"{ }")
    assert scan_root(f"memory:/{root}").found[AdapterId("acme", "a", 1)].signature != found.signature


@pytest.mark.parametrize("url", ["https://adapters.test/all", "hf://org/adapters", "nonsense://x/y"])
def test_a_store_without_a_listing_is_refused_as_a_root(url: str) -> None:
    with pytest.raises(AdapterRejected) as refused:
        scan_root(url)
    assert refused.value.code == "SOURCE_UNSUPPORTED"
