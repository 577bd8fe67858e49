# SPDX-License-Identifier: Apache-2.0
"""When freed pages go back: those that stayed unused for a whole period."""

from __future__ import annotations


class LowWater:
    """Follows the least number of unused pages over consecutive periods.

    Pages below the low-water mark of a period were not needed at any moment of
    it, which is what an idle time per page would say, without a clock per page.

    Args:
        period_s: length of a period in seconds.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._low = 0
        self._ends_at: float | None = None

    def observe(self, unused: int, now: float) -> int:
        """Take note of ``unused`` pages at ``now``; return how many have aged."""
        if self._ends_at is None:
            self._low, self._ends_at = unused, now + self._period_s
            return 0
        self._low = min(self._low, unused)
        if now < self._ends_at:
            return 0
        aged, self._low = self._low, unused
        self._ends_at = now + self._period_s
        return aged

    def dip(self, unused: int) -> None:
        """As :meth:`observe`, between two looks at the clock."""
        self._low = min(self._low, unused)

    def is_due(self, now: float) -> bool:
        """Whether a period has ended that :meth:`observe` has not seen end."""
        return self._ends_at is not None and now >= self._ends_at
