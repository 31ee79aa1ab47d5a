"""A lane works at the priority that it may have."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from lora_runtime.adapters.lanes import Lane

pytestmark = pytest.mark.skipif(not hasattr(os, "setpriority"), reason="no priorities here")


def done(lane: Lane) -> bool:
    ran = threading.Event()
    lane.submit(ran.set)
    return ran.wait(5)


def test_others_run_before_a_nice_lane() -> None:
    found: list[int] = []
    lane = Lane("nice", 1, niceness=7)
    lane.submit(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    assert done(lane) and lane.stop(5)
    assert found == [max(7, os.getpriority(os.PRIO_PROCESS, 0))]


def test_a_process_that_is_nicer_already_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a privilege nobody may become less nice: a server started by `nice` must still load adapters."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "getpriority", lambda *_: 10)
    monkeypatch.setattr(os, "setpriority", refuse)
    lane = Lane("nicer", 1, niceness=5)
    assert done(lane) and lane.stop(5)


def test_a_sandbox_that_forbids_it_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(os, "getpriority", lambda *_: 0)
    lane = Lane("boxed", 1, niceness=5)
    with caplog.at_level(logging.WARNING):
        assert done(lane) and lane.stop(5)
    assert "boxed: its threads keep their priority: Operation not permitted" in caplog.text
