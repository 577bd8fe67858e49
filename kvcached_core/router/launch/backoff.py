# SPDX-License-Identifier: Apache-2.0
"""How long to wait before an engine that ended is started again. Pure policy."""

from __future__ import annotations

from ..settings import RestartSettings


class Backoff:
    """Doubles with each failure up to a bound; begins anew after a run that was long enough."""

    def __init__(self, settings: RestartSettings) -> None:
        self._settings = settings
        self._failures = 0

    def failed(self, ready_s: float) -> None:
        """Note an end; ``ready_s``: for how long it had been ready, 0 if it never was."""
        if ready_s >= self._settings.healthy:
            self._failures = 0
        self._failures += 1

    @property
    def delay_s(self) -> float:
        """Seconds until the next start; 0 before any failure."""
        if self._failures == 0:
            return 0.0
        # More doublings than that would overflow, and are beyond any bound.
        doublings = min(self._failures - 1, 40)
        return float(min(self._settings.delay * 2**doublings, self._settings.longest))
