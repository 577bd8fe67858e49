# SPDX-License-Identifier: Apache-2.0
"""Memory that others have a claim to: in what order an engine gives it back, and of which pool."""

from __future__ import annotations

from collections.abc import Sequence

from .accounts import Accounts
from .acts import Acts
from .pools import Pools


class Giving:
    """What an engine owes, pass by pass. Bytes are those of the pools' first shapes.

    Args:
        accounts: of the engine, in which what was reclaimed is counted.
        pools: of the engine; some may be added later.
        acts: by which they are changed.
    """

    def __init__(self, accounts: Accounts, pools: Pools, acts: Acts) -> None:
        self._accounts = accounts
        self._pools = pools
        self._acts = acts
        self._owed_bytes = 0

    def owe(self, num_bytes: int, of_caches: int) -> None:
        """Give back so much in this pass: unused pages now, and what requests free until its end.

        Args:
            num_bytes: all of it; what an earlier pass owed and could not give is forgotten.
            of_caches: for so much of it cached blocks go as well.
        """
        self._owed_bytes = num_bytes
        if num_bytes:
            self._evict_for(of_caches)
            self.settle()

    def settle(self) -> None:
        """Decommit parked pages that are owed, as far as they can be spared."""
        if not self._owed_bytes:
            return
        before = self._pools.committed()
        for index, pool in enumerate(self._pools):
            pages = min(pool.pages_in(self._owed_bytes), pool.spare_pages)
            self._owed_bytes = max(0, self._owed_bytes - self._acts.shrink(index, pages))
        gone = [was - now for was, now in zip(before, self._pools.committed(), strict=True)]
        for account, num_bytes in zip(self._accounts, gone, strict=True):
            if num_bytes:
                account.member.count("reclaimed_bytes", num_bytes)

    def _evict_for(self, num_bytes: int) -> None:
        """Empty pages of the caches until so much is spare, or all that can be."""
        pools = self._pools
        cached = [pool.num_cached * pool.block_bytes for pool in pools]
        wanted = pools.missing(num_bytes)
        # In proportion, since they hold parts of the same prefixes.
        for index, pool in enumerate(pools):
            share = -(-wanted * cached[index] // max(1, sum(cached)))
            self._acts.empty(index, pool.pages_in(min(share, pools.missing(num_bytes))))
        if len(pools) > 1:  # what rounding left over
            for index, pool in enumerate(pools):
                self._acts.empty(index, pool.pages_in(pools.missing(num_bytes)))

    def let_go(self, needed: Sequence[int]) -> None:
        """Give up all unused pages but those for so many blocks of every pool."""
        for index, (pool, keep) in enumerate(zip(self._pools, needed, strict=True)):
            pool.keep_pages = max(pool.keep_pages, pool.pages_for(keep))
            self._acts.shrink(index, pool.spare_pages)

    def give_all(self) -> None:
        """Give back all that no request uses."""
        for index, pool in enumerate(self._pools):
            if pool.cache is not None:
                pool.cache.sweep()
                self._acts.keep(index, 0)
            self._acts.shrink(index, pool.allocator.parked_pages)

    def yield_to(self, short: Sequence[int], needed: Sequence[int]) -> bool:
        """Let pools that are not short give up what those that are lack: a member is never asked
        for its own demand. First unused pages go, then cached blocks.

        Args:
            short: blocks every pool lacks, and neither caches itself nor could lease.
            needed: clean blocks every pool is still to take in this pass.

        Returns:
            Whether there was something, or is on its way.
        """
        returning = self._pools.returning_here()
        missing = -returning
        for pool, lack, keep in zip(self._pools, short, needed, strict=True):
            missing += max(0, lack) * pool.block_bytes
            pool.keep_pages = max(pool.keep_pages, pool.pages_for(keep))
        for evicts in (False, True):
            for index, pool in enumerate(self._pools):
                if short[index] > 0 or missing <= 0:
                    continue
                pages = pool.pages_in(missing)
                if evicts:
                    self._acts.empty(index, pages - pool.spare_pages)
                missing -= self._acts.shrink(index, min(pages, pool.spare_pages))
        return self._pools.gives or returning > 0
