# SPDX-License-Identifier: Apache-2.0
"""All pools of an engine, and what they sum up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .accounts import Account, Accounts
from .demand import Request, next_blocks
from .pool import Pool


class Pools(list[Pool]):
    """In the order in which they were made.

    Bytes are those of one rank, or of every account where a list is returned.

    Args:
        accounts: the engine's memberships, as the first pool's are ordered.
    """

    def __init__(self, accounts: Accounts) -> None:
        super().__init__()
        self._accounts = accounts

    @property
    def unit(self) -> Pool:
        """The pool whose page is the least that can be given."""
        return min(self, key=lambda pool: pool.page_bytes)

    @property
    def gives(self) -> bool:
        """Whether this pass gives memory back."""
        return any(pool.decommit for pool in self)

    def held_bytes(self) -> int:
        """Of all committed pages."""
        return sum(p.page_bytes * p.allocator.committed_pages(0) for p in self)

    def missing(self, num_bytes: int) -> int:
        """How much less than so many bytes is spare; what a pool lacks for itself counts too."""
        spare = sum((p.allocator.parked_pages - p.keep_pages) * p.page_bytes for p in self)
        return max(0, num_bytes - spare)

    # -- what running requests hold -------------------------------------------

    def keep_for_next(self, running: Sequence[Request]) -> None:
        """Keep the parked pages that the running requests may need in this pass."""
        for pool in self:
            allocator = pool.allocator
            beside = max(0, allocator.num_clean - pool.blocks_on(allocator.parked_pages))
            needed = next_blocks(pool, running) - beside if running else 0
            pool.keep_pages = pool.pages_for(max(0, needed))

    def withhold(self, num_bytes: int) -> None:
        """Have running requests free so much, of every pool in proportion to what they hold."""
        held = [(pool.allocator.num_live - 1) * pool.block_bytes for pool in self]
        for pool, part in zip(self, held, strict=True):
            pool.withheld_blocks = pool.blocks_in(-(-num_bytes * part // max(1, sum(held))))

    # -- in the accounts ------------------------------------------------------

    def committed(self) -> list[int]:
        return self._sums(lambda pool, account: account.cost(pool.committed_pages()))

    def cached(self) -> list[int]:
        return self._sums(lambda pool, account: pool.num_cached * account.block_cost)

    def spare(self) -> list[int]:
        return self._sums(lambda pool, account: pool.spare_pages * account.page_cost[0])

    def all_returning(self) -> list[int]:
        """Bytes given up that the workers have not released yet."""
        return [
            max(0, account.member.leased - committed)
            for account, committed in zip(self._accounts, self.committed(), strict=True)
        ]

    def returning_here(self) -> int:
        """The same of one rank."""
        unit, most = self.unit, 0
        for account, returning in zip(unit.accounts, self.all_returning(), strict=True):
            pages = -(-returning // max(account.page_cost[0], 1))
            most = max(most, pages * unit.page_bytes)
        return most

    def _sums(self, bytes_of: Callable[[Pool, Account], int]) -> list[int]:
        totals = [0] * len(self._accounts)
        for pool in self:
            for index, account in enumerate(pool.accounts):
                totals[index] += bytes_of(pool, account)
        return totals
