# SPDX-License-Identifier: Apache-2.0
"""One engine's account on every ledger its ranks draw on.

Ranks of a tensor-parallel engine sit on GPUs of their own, each with its own
ledger; on the host they share one.  A lease is granted on all of them or on
none, so a block is never backed on one rank and missing on another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._core import Ledger, Member


@dataclass(slots=True)
class Account:
    """This engine's membership in one ledger."""

    ledger: Ledger
    member: Member
    page_cost: tuple[int, ...]
    """Bytes one page index of each geometry costs here, over all ranks on this ledger."""
    block_cost: int
    """Bytes of one block here, over all ranks on this ledger."""

    def cost(self, pages: Sequence[int]) -> int:
        """Bytes of ``pages[g]`` page indices of every geometry ``g``."""
        return sum(count * cost for count, cost in zip(pages, self.page_cost, strict=True))


class Accounts:
    """All-or-nothing leases over several ledgers."""

    def __init__(self, accounts: Sequence[Account]) -> None:
        self._accounts = tuple(accounts)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts)

    def lease(self, pages: Sequence[int]) -> bool:
        """Lease ``pages[g]`` page indices of every geometry; False leaves nothing leased."""
        granted: list[tuple[Account, int]] = []
        for account in self._accounts:
            amount = account.cost(pages)
            if not account.member.lease(amount):
                for other, held in granted:
                    other.member.release(held)
                return False
            granted.append((account, amount))
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Give back a lease whose pages were never committed."""
        for account in self._accounts:
            account.member.release(account.cost(pages))

    def affordable_blocks(self, uncommitted: int, uncommitted_pages: Sequence[int]) -> int:
        """How many of ``uncommitted`` blocks the ledgers could back now.

        Exact when all of them fit; else rounded down to whole blocks, not pages,
        so it never promises what a lease would refuse for more than one page.
        """
        blocks = uncommitted
        for account in self._accounts:
            available = account.ledger.available()
            if available < account.cost(uncommitted_pages):
                blocks = min(blocks, available // max(account.block_cost, 1))
        return blocks

    def set_demand(self, pages: Sequence[int]) -> None:
        """Tell the other members what this engine waits for; zeros withdraw it."""
        for account in self._accounts:
            account.member.set_demand(account.cost(pages))

    def close(self) -> None:
        for account in self._accounts:
            account.member.leave()
