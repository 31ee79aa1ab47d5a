"""Ten thousand adapters without label names do not fill the log."""

from __future__ import annotations

import logging

import pytest

from server.log_repeats import RepeatsFilter


def test_a_warning_passes_three_times_and_says_that_it_stops(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.log_repeats")
    repeats = RepeatsFilter()
    logger.addFilter(repeats)
    try:
        for i in range(100):
            logger.warning("adapter %s: %s", f"a{i}", "no file names its labels")
        logger.warning("adapter %s: %s", "b", "another warning")
        logger.warning("loading took %d s", 3)
    finally:
        logger.removeFilter(repeats)
    assert [record.getMessage() for record in caplog.records] == [
        "adapter a0: no file names its labels",
        "adapter a1: no file names its labels",
        "adapter a2: no file names its labels (not logged for further adapters; `multilora adapters inspect` shows it)",
        "adapter b: another warning",
        "loading took 3 s",
    ]
