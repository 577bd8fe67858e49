# SPDX-License-Identifier: Apache-2.0
"""Wakes an idle engine that has memory to give back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Watcher:
    """A thread that looks at the ledger while the engine may be blocked on its queue.

    It outlives errors, which are logged: without it an idle engine would answer nobody any more.

    Args:
        attend: does what has to be done between steps; whether a step is wanted.
        wake: makes the engine run a step; called from the watcher's thread.
        wait: returns when a ledger has news for this engine, or after so many milliseconds.
        period_ms: how often to look if there is no news.
    """

    def __init__(
        self,
        attend: Callable[[], bool],
        wake: Callable[[], object],
        wait: Callable[[int], object],
        period_ms: int = 20,
    ) -> None:
        self._attend = attend
        self._wake = wake
        self._wait = wait
        self._period_ms = period_ms
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kvcached-watcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failing = False
        while not self._stopped:
            try:
                if self._attend():
                    self._wake()
                # After a wake as well: looking again before the step ran would ask for another.
                self._wait(self._period_ms)
                failing = False
            except Exception:
                if not failing:  # once, however long it lasts
                    logger.exception("Looking after the memory ledger failed; trying again")
                failing = True
                time.sleep(self._period_ms / 1000)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()
