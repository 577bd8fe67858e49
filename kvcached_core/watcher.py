# SPDX-License-Identifier: Apache-2.0
"""Wakes an idle engine that has memory to give back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Watched(Protocol):
    """What the watcher needs of the scheduler half."""

    def refresh_usage(self) -> None: ...
    def wants_step(self) -> bool: ...


class Watcher:
    """A thread that looks at the ledger while the engine may be blocked on its queue.

    Args:
        scheduler: asked whether a step is wanted; never changed from here.
        wake: makes the engine run a step; called from the watcher's thread.
        period_s: how often to look.
    """

    def __init__(
        self, scheduler: Watched, wake: Callable[[], object], period_s: float = 0.02
    ) -> None:
        self._scheduler = scheduler
        self._wake = wake
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcached-watcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._scheduler.refresh_usage()
            if self._scheduler.wants_step():
                self._wake()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
