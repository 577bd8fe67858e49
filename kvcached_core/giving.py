# SPDX-License-Identifier: Apache-2.0
"""Memory that others have a claim to: in what order an engine gives it back, and of which pool."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from .accounts import Accounts
from .acts import Acts
from .pools import Pools

_GIVE_WAY_S = 1.0
"""How long an engine that stands still keeps what it holds, while another one does as well."""
_STAND_BACK_S = 1.0
"""For how long it lets the others go first then: what it gave is not enough for two."""
_LOST_S = 0.05
"""The same for one that lost the only request it ran; twice as long each time, and longer the more
members come before it in the ledger's table."""
_MOST_LOSSES = 5


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
        self._still_since: float | None = None
        self._back_until = -math.inf
        self._losses = 0

    def stands_back(self, now: float) -> bool:
        """Whether this engine gave way a moment ago, and takes nothing for what does not run."""
        return now < self._back_until

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

    def note_still(self, still: bool) -> None:
        """Whether nothing runs in this pass for want of memory that others wait for as well.

        If all of them hold equal parts, nobody is asked for any: one after the other they give up
        all that no request uses, and stand back, until somebody has enough.
        """
        if not still:
            self._still_since = None
            return
        now = time.monotonic()
        if self._still_since is None:
            self._still_since = now
        elif now - self._still_since >= _GIVE_WAY_S * (1 + self._accounts.waiting_behind()):
            self._still_since = now
            self._back_until = now + _STAND_BACK_S
            self.give_all()

    def note_lost(self) -> None:
        """The engine had to preempt the only request it ran.

        Engines that do that in turns, each in the middle of a long prompt, would all begin anew for
        ever. So the first in the ledger's table goes on as it likes, and others that do not have
        a higher priority leave it more and more time to finish.
        """
        now = time.monotonic()
        if now - self._back_until > _LOST_S * 2**_MOST_LOSSES:
            self._losses = 0
        self._losses = min(self._losses + 1, _MOST_LOSSES)
        self._back_until = now + _LOST_S * 2**self._losses * min(self._accounts.rivals_before(), 3)
        if self.stands_back(now):
            self.give_all()

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
