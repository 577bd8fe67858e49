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
    # Once for all three.
    (record,) = caplog.records
    assert "trying again" in record.message
    assert record.exc_info is not None
    assert "the driver is busy" in str(record.exc_info[1])


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
    assert len(caplog.records) == 2


def test_a_bell_that_fails_keeps_no_core_busy() -> None:
    looked = itertools.count()

    def attend() -> bool:
        next(looked)
        return False

    def wait(timeout_ms: int) -> None:
        raise OSError("no such member")

    watcher = Watcher(attend, lambda: None, wait, period_ms=20)
    time.sleep(0.2)
    watcher.stop()
    assert 2 <= next(looked) <= 12
