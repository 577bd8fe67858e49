# SPDX-License-Identifier: Apache-2.0
"""What an engine tells its ledgers of the memory it holds, whenever that has changed."""

from __future__ import annotations

from .accounts import Accounts
from .pools import Pools


class Told:
    """Keeps parked, cached and returning bytes of every ledger true.

    Args:
        accounts: of the engine.
        pools: of the engine; some may be added later.
    """

    def __init__(self, accounts: Accounts, pools: Pools) -> None:
        self.settling = False
        """Whether pages that were given up are not released by their workers yet."""
        self._accounts = accounts
        self._pools = pools
        self._spare: list[tuple[int, int, int, int]] = []

    def spare(self) -> bool:
        """Tell what is parked and cached; whether anything has changed."""
        spare = [
            (p.allocator.parked_pages, p.keep_pages, p.num_cached, p.allocator.committed_pages(0))
            for p in self._pools
        ]
        if spare == self._spare:
            return False
        self._spare = spare
        sums = zip(self._accounts, self._pools.spare(), self._pools.cached(), strict=True)
        for account, parked, cached in sums:
            account.member.set_parked(parked)
            account.member.set_cached(cached)
        return True

    def all(self, gave: bool) -> None:
        """Tell everything at the end of a pass, in which something was given up or not."""
        if not self.spare() and not gave and not self.settling:
            return
        settling = gave
        for account, returning in zip(self._accounts, self._pools.all_returning(), strict=True):
            settling = settling or returning > 0
            account.member.set_returning(returning)
        # At once: another thread looks at it.
        self.settling = settling
