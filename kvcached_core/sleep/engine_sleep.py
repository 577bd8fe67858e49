# SPDX-License-Identifier: Apache-2.0
"""The scheduler half of sleep and wake: what the ledgers are told, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._core import Ledger, Member
from .wake_lease import lease_all

if TYPE_CHECKING:
    from ..scheduler import ElasticScheduler


class EngineSleep:
    """Keeps an engine's account true while its weights go and come.

    Args:
        scheduler: of the engine.
        memberships: its ledgers and members, by the device's key.
        keys: the device of every rank.
        wait_s: how long a wake waits for room.
    """

    def __init__(
        self,
        scheduler: ElasticScheduler,
        memberships: Mapping[str, tuple[Ledger, Member]],
        keys: Sequence[str],
        wait_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._memberships = dict(memberships)
        self._keys = tuple(keys)
        self._wait_s = wait_s
        self._away = dict.fromkeys(self._memberships, 0)

    @property
    def away(self) -> int:
        """Bytes of weights that the devices do without now."""
        return sum(self._away.values())

    def note_away(self, ranks: Sequence[int]) -> None:
        """Tell the ledgers what has gone.

        Args:
            ranks: bytes every rank's device does without now.
        """
        for key, now in self._sums(ranks).items():
            more = now - self._away[key]
            if more > 0:
                self._memberships[key][1].add_static(-more)
                self._away[key] = now
        self._scheduler.refresh_usage(force=True)

    @contextmanager
    def waking(self, ranks: Sequence[int]) -> Iterator[None]:
        """Room for what comes back inside the block; all of it has when the block ends well.

        Args:
            ranks: bytes that come back to every rank's device.

        Raises:
            WakeRefused: there is no room, and nobody gave any in time.
        """
        wanted = self._sums(ranks)
        leases = lease_all(
            [(*self._memberships[key], num_bytes) for key, num_bytes in wanted.items()],
            self._wait_s,
            self._scheduler.refresh_usage,
        )
        try:
            yield
            for lease in leases:
                lease.hand_over(lease.num_bytes)
            for key, num_bytes in wanted.items():
                self._away[key] -= num_bytes
        finally:
            for lease in leases:
                lease.close()
            self._scheduler.refresh_usage(force=True)

    def _sums(self, ranks: Sequence[int]) -> dict[str, int]:
        sums = dict.fromkeys(self._memberships, 0)
        for key, num_bytes in zip(self._keys, ranks, strict=True):
            sums[key] += num_bytes
        return sums
