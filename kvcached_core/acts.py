# SPDX-License-Identifier: Apache-2.0
"""What a pass does to the pools of an engine: grow, shrink, and let cached blocks go."""

from __future__ import annotations

from collections.abc import Sequence

from ._core import Growth
from .accounts import Accounts
from .pools import Pools

Act = tuple[str, int, int]
"""What was done, how much of it, and to which pool."""


class Acts:
    """The only way in which the scheduler half changes allocators and caches.

    Each act is noted where other ranks repeat it (:class:`~kvcached_core.lockstep.Replica`): their
    allocators stay equal to these as long as nothing is done behind its back.

    Args:
        accounts: of the engine.
        pools: of the engine; some may be added later.
        counters: of pages committed and decommitted since the start, which are brought up to date.
    """

    def __init__(self, accounts: Accounts, pools: Pools, counters: dict[str, int]) -> None:
        self.journal: list[Act] | None = None
        """What was done, for ranks that repeat it; None: nobody."""
        self._accounts = accounts
        self._pools = pools
        self._counters = counters

    def grow(self, index: int, num_blocks: int, urgent: bool = False) -> int:
        """Lease and commit up to so many more blocks; return how many came."""
        pool = self._pools[index]
        wanted, growth = pool.grow(num_blocks, urgent)
        if growth is None:
            return 0
        self._grown(index, wanted, growth)
        return growth.num_blocks

    def grow_together(self, num_blocks: Sequence[int], urgent: bool = False) -> bool:
        """Lease and commit so many more blocks of every pool, all in one step or none."""
        growths: list[tuple[int, int, Growth]] = []
        costs = [0] * len(self._accounts)
        for index, (pool, wanted) in enumerate(zip(self._pools, num_blocks, strict=True)):
            if 0 < wanted <= pool.allocator.num_uncommitted:
                growth = pool.allocator.grow(wanted)
                growths.append((index, wanted, growth))
                more = pool.accounts.costs(growth.page_delta)
                costs = [all_ + own for all_, own in zip(costs, more, strict=True)]
        there = len(growths) == sum(wanted > 0 for wanted in num_blocks)
        if not there or not self._accounts.lease_bytes(costs, urgent):
            for index, _, growth in growths:
                self._pools[index].allocator.undo(growth)
            return False
        for index, wanted, growth in growths:
            self._grown(index, wanted, growth)
        return True

    def _grown(self, index: int, wanted: int, growth: Growth) -> None:
        self._note("grow", wanted, index)
        self._counters["committed_pages"] += sum(growth.page_delta)
        self._pools[index].commit += growth.ranges

    def shrink(self, index: int, pages: int) -> int:
        """Decommit up to so many parked pages; return their bytes."""
        if pages <= 0:
            return 0
        pool = self._pools[index]
        self._note("shrink", pages * pool.page_bytes, index)
        shrunk = pool.allocator.shrink(pages * pool.page_bytes)
        self._counters["decommitted_pages"] -= sum(shrunk.page_delta)
        pool.decommit += shrunk.ranges
        return -shrunk.page_delta[0] * pool.page_bytes

    def empty(self, index: int, pages: int) -> None:
        """Let cached blocks go until so many pages more are parked, or none is cached."""
        cache = self._pools[index].cache
        if cache is not None and cache.num_cached and pages > 0:
            self._note("empty", pages, index)
            cache.empty_pages(pages)

    def keep(self, index: int, num_blocks: int) -> None:
        """Let cached blocks go until no more than so many are left."""
        cache = self._pools[index].cache
        if cache is not None and cache.num_cached > num_blocks:
            self._note("keep", num_blocks, index)
            cache.evict_down_to(num_blocks)

    def _note(self, act: str, amount: int, index: int) -> None:
        if self.journal is not None:
            self.journal.append((act, amount, index))
