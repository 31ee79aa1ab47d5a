"""The audit log: complete, never in the way, and honest about what it lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.tenancy.audit import AuditLog
from server.tenancy.model import Principal, Role

ALICE = Principal("acme", frozenset({Role.ADAPTERS}), "key-alice")
DELETE = "multilora.v1.AdapterService/DeleteAdapter"


def note(log: AuditLog, request_id: str = "r1", **fields: Any) -> None:
    log.record(ALICE, DELETE, outcome="OK", request_id=request_id, **fields)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[str]:
    return [line["request_id"] for line in lines(path)]


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at, "nothing happened"
        time.sleep(0.005)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr("server.tenancy.audit.os.write", disk.write)
    return disk


class Disk:
    """`os.write` of a disk with `free` bytes left; waits while it is held."""

    def __init__(self) -> None:
        self.free = 10**9
        self.running = threading.Event()
        self.running.set()
        self.num_calls = 0
        self._write = os.write

    def write(self, fd: int, data: bytes) -> int:
        self.num_calls += 1
        assert self.running.wait(10)
        if not self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(fd, data[: self.free])
        self.free -= written
        return written


def test_a_line_says_who_did_what_and_how_it_ended(path: Path) -> None:
    log = AuditLog(path, wall_clock=lambda: 1_700_000_000.0625)
    note(log, target="tenants/acme/adapters/news/versions/1", peer="ipv4:10.0.0.7:5512")
    log.record(None, DELETE, outcome="UNAUTHENTICATED", reason="KEY_UNKNOWN", request_id="r2")
    log.close()
    done, denied = lines(path)
    assert done == {
        "time": "2023-11-14T22:13:20.062Z",
        "principal": "key-alice",
        "tenant": "acme",
        "method": DELETE,
        "target": "tenants/acme/adapters/news/versions/1",
        "versions": "",
        "outcome": "OK",
        "reason": "",
        "request_id": "r1",
        "peer": "ipv4:10.0.0.7:5512",
        "key_id": "",
    }
    assert (denied["principal"], denied["tenant"], denied["reason"]) == ("", "", "KEY_UNKNOWN")


def test_whatever_a_peer_sends_stays_within_one_short_line(path: Path) -> None:
    log = AuditLog(path)
    note(log, target="a\nb\r\u2028\udcff\x00" + "x" * 100_000)
    log.close()
    (line,) = lines(path)
    assert line["target"].startswith("a\nb")
    assert path.stat().st_size < 2000


def test_without_a_path_nothing_happens() -> None:
    log = AuditLog(None)
    note(log)
    log.close()
    assert (log.num_lost, log.num_overflowed) == (0, 0)


def test_a_file_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl")


def test_lines_of_an_earlier_server_are_kept_and_others_cannot_read_them(path: Path) -> None:
    for number in range(2):
        log = AuditLog(path)
        note(log, f"r{number}")
        log.close()
    assert ids(path) == ["r0", "r1"]
    assert path.stat().st_mode & 0o077 == 0


def test_lines_appear_without_waiting_for_the_end(path: Path) -> None:
    log = AuditLog(path)
    note(log)
    until(lambda: path.read_text().endswith("\n"))
    log.close()


def test_threads_do_not_tear_each_others_lines(path: Path) -> None:
    log = AuditLog(path)
    threads = [threading.Thread(target=lambda: [note(log) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(lines(path)) == 2000


def test_what_comes_after_the_end_is_counted_as_lost(path: Path) -> None:
    log = AuditLog(path)
    log.close()
    note(log)
    log.close()
    assert log.num_overflowed == 1


@pytest.mark.parametrize("how", ["rename", "delete"])
def test_a_rotated_file_is_left_and_a_new_one_begun(path: Path, how: str) -> None:
    log = AuditLog(path)
    note(log, "before")
    until(lambda: path.stat().st_size > 0)
    if how == "rename":
        path.rename(path.with_suffix(".1"))
    else:
        path.unlink()
    note(log, "after")
    log.close()
    assert ids(path) == ["after"]
    if how == "rename":
        assert ids(path.with_suffix(".1")) == ["before"]


def test_a_slow_disk_overflows_the_queue_and_blocks_nobody(
    path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.running.clear()
    log = AuditLog(path, max_waiting=100)
    note(log, "r0")
    until(lambda: disk.num_calls == 1)
    started = time.perf_counter()
    for number in range(1, 1001):
        note(log, f"r{number}")
    assert time.perf_counter() - started < 1
    assert log.num_overflowed == 900
    disk.running.set()
    log.close()
    assert ids(path) == [f"r{number}" for number in range(101)]
    assert [record.message for record in caplog.records] == [
        "audit log: 900 lines are lost, 100 wait already; is the disk slow?"
    ]


def test_a_full_disk_costs_lines_and_is_reported_once(path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    log = AuditLog(path)
    note(log, "kept")
    until(lambda: path.stat().st_size > 0)
    disk.free = 20  # the next line is torn
    for number in range(3):
        note(log, f"lost{number}")
        until(lambda number=number: log.num_lost == number + 1)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "No space left on device" in caplog.records[0].message
    disk.free = 10**9
    note(log, "kept again")
    log.close()
    assert log.num_lost == 3
    kept, torn, again = path.read_text().splitlines()
    assert (json.loads(kept)["request_id"], json.loads(again)["request_id"]) == ("kept", "kept again")
    assert len(torn) == 20
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_a_folder_that_vanished_costs_lines_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    log = AuditLog(folder / "audit.jsonl")
    (folder / "audit.jsonl").unlink()
    folder.rmdir()
    note(log, "lost")
    until(lambda: log.num_lost == 1)
    folder.mkdir()
    note(log, "kept")
    log.close()
    assert ids(folder / "audit.jsonl") == ["kept"]


def test_a_disk_that_hangs_does_not_keep_the_process(
    path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tenancy.audit._CLOSE_S", 0.05)
    disk.running.clear()
    log = AuditLog(path)
    note(log)
    log.close()
    assert "the disk does not answer" in caplog.text
    disk.running.set()
    log.close()
