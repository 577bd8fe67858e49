# SPDX-License-Identifier: Apache-2.0
"""How many requests a model had, and since when it has had none."""

from __future__ import annotations

import time
from collections import deque

LONGEST_WINDOW_S = 3600
"""Rates are known for the last hour."""


class Traffic:
    """The requests of one model since the router knows it."""

    def __init__(self) -> None:
        self.total = 0
        self.successful = 0
        self.failed = 0
        self.last_activity = time.time()
        """When a request last came or ended, of the wall clock; at first the start."""
        self._last = time.monotonic()
        self._in_flight = 0
        self._answer_s = 0.0
        # Second and requests in it; one entry a second however many come.
        self._seconds: deque[tuple[int, int]] = deque(maxlen=LONGEST_WINDOW_S + 1)

    @property
    def idle_s(self) -> float:
        """Seconds without a request; 0 while one is in flight."""
        return 0.0 if self._in_flight else time.monotonic() - self._last

    @property
    def mean_answer_s(self) -> float:
        """Of the answers that were complete."""
        return self._answer_s / self.successful if self.successful else 0.0

    def touch(self) -> None:
        """Begin the time of idleness anew."""
        self.last_activity = time.time()
        self._last = time.monotonic()

    def began(self) -> None:
        self._in_flight += 1
        self.touch()
        second = int(self._last)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + 1)
        else:
            self._seconds.append((second, 1))

    def ended(self) -> None:
        self._in_flight -= 1
        self.touch()

    def answered(self, successful: bool, seconds: float) -> None:
        """Count a request: ``successful`` if it was answered in full without an error."""
        self.total += 1
        if successful:
            self.successful += 1
            self._answer_s += seconds
        else:
            self.failed += 1

    def rate(self, window_s: float) -> float:
        """Requests a second over the last ``window_s`` seconds."""
        since = time.monotonic() - window_s
        return sum(count for second, count in self._seconds if second >= since) / window_s
