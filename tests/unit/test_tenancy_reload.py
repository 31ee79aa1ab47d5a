"""Values that follow their files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from server.tenancy.reload import Reloading, poll_every


class Numbers:
    """Two files with a number each, whose sum is the value."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "a", folder / "b"]
        for path in self.paths:
            path.write_text("1")
        self.errors: list[str] = []
        self.reloading = Reloading(self.paths, self.load, lambda error: self.errors.append(str(error)))

    def load(self) -> int:
        return sum(int(path.read_text()) for path in self.paths)


@pytest.fixture
def numbers(tmp_path: Path) -> Numbers:
    return Numbers(tmp_path)


def test_a_change_of_any_file_is_followed(numbers: Numbers) -> None:
    assert numbers.reloading.value == 2
    assert not numbers.reloading.poll()
    for path, total in zip(numbers.paths, (10, 18), strict=True):
        path.write_text("9")
        assert numbers.reloading.value != total
        assert numbers.reloading.poll()
        assert numbers.reloading.value == total
    assert numbers.errors == []


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(numbers: Numbers, tmp_path: Path) -> None:
    old = numbers.paths[0].stat()
    (tmp_path / "new").write_text("7")
    os.utime(tmp_path / "new", ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(tmp_path / "new", numbers.paths[0])
    assert numbers.reloading.poll()
    assert numbers.reloading.value == 8


def test_a_moved_symlink_is_noticed(tmp_path: Path) -> None:
    """As Kubernetes updates mounted secrets."""
    for name, text in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    (tmp_path / "data").symlink_to("one")
    path = tmp_path / "data" / "file"
    reloading = Reloading(path, path.read_text, lambda error: pytest.fail(str(error)))
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "data")
    assert reloading.poll()
    assert reloading.value == "2"


def test_a_broken_file_keeps_the_value_and_is_told_once(numbers: Numbers) -> None:
    numbers.paths[0].write_text("x")
    for _ in range(3):
        assert not numbers.reloading.poll()
    assert numbers.reloading.value == 2
    assert len(numbers.errors) == 1
    numbers.paths[0].write_text("xyz")
    assert not numbers.reloading.poll()
    assert len(numbers.errors) == 2
    numbers.paths[0].write_text("4")
    assert numbers.reloading.poll()
    assert numbers.reloading.value == 5


def test_a_vanished_file_keeps_the_value(numbers: Numbers) -> None:
    numbers.paths[0].unlink()
    assert not numbers.reloading.poll()
    assert numbers.reloading.value == 2
    numbers.paths[0].write_text("1")
    assert numbers.reloading.poll()


def test_a_failure_that_passes_by_itself_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    outcomes = iter([1, OSError("too many open files"), 2])

    def load() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    reloading = Reloading(path, load, lambda _: None)
    path.write_text("22")
    assert not reloading.poll()
    assert reloading.poll()
    assert reloading.value == 2


def test_the_first_load_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Reloading(tmp_path / "absent", (tmp_path / "absent").read_text, lambda _: None)


async def test_a_task_polls(numbers: Numbers) -> None:
    task = asyncio.create_task(poll_every(0.01, numbers.reloading.poll))
    numbers.paths[0].write_text("9")
    async with asyncio.timeout(10):
        while numbers.reloading.value != 10:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
