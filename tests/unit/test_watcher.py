# SPDX-License-Identifier: Apache-2.0
"""The thread that looks at the ledger while an engine is idle."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from kvcached_core.watcher import Watcher
from tests.support.watch import wait_until


def _wait(timeout_ms: int) -> None:
    time.sleep(timeout_ms / 1000)


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The errors of these tests' watchers, not of any that another test left."""
    told = [r for r in caplog.records if r.exc_info and "driver is busy" in str(r.exc_info[1])]
    return [record.message for record in told]


def test_it_looks_again_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    calls = itertools.count()
    woken = threading.Event()

    def attend() -> bool:
        if next(calls) < 3:
            raise OSError("the driver is busy")
        return True

    watcher = Watcher(attend, woken.set, _wait, period_ms=1)
    try:
        assert woken.wait(10)
    finally:
        watcher.stop()
    (message,) = _told(caplog)  # once for all three
    assert "trying again" in message


def test_every_new_failure_is_told(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([True, False, True, False])
    woken = []

    def attend() -> bool:
        if next(times, False):
            raise OSError("the driver is busy")
        return True

    watcher = Watcher(attend, lambda: woken.append(1), _wait, period_ms=1)
    try:
        wait_until(lambda: len(woken) >= 2, 10, "woken twice")
    finally:
        watcher.stop()
    assert len(_told(caplog)) == 2


def test_a_bell_that_fails_keeps_no_core_busy() -> None:
    looked: list[float] = []

    def attend() -> bool:
        looked.append(time.monotonic())
        return False

    def wait(timeout_ms: int) -> None:
        raise OSError("no such member")

    watcher = Watcher(attend, lambda: None, wait, period_ms=20)
    try:
        wait_until(lambda: len(looked) >= 5, 10, "it goes on")
    finally:
        watcher.stop()
    assert all(after - before >= 0.02 for before, after in itertools.pairwise(looked))
