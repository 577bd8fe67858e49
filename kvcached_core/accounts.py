# SPDX-License-Identifier: Apache-2.0
"""One engine's account on every ledger its ranks draw on.

Ranks of a tensor-parallel engine sit on GPUs of their own, each with its own
ledger; on the host they share one.  A lease is granted on all of them or on
none, so a block is never backed on one rank and missing on another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ._core import Ledger, Member, MemberInfo


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


class Bell:
    """One listener to a ledger's news.

    Engines with several ledgers listen to the first; what the others have to
    say is seen after the timeout.
    """

    def __init__(self, member: Member | None) -> None:
        self._member = member
        self._heard = member.bell if member is not None else 0

    def wait(self, timeout_ms: int) -> None:
        """Return at the next news, at once if there was some, or after ``timeout_ms``."""
        if self._member is None:
            time.sleep(timeout_ms / 1000)
        else:
            self._heard = self._member.wait_bell(self._heard, timeout_ms)


class Accounts:
    """All-or-nothing leases over several ledgers."""

    def __init__(self, accounts: Sequence[Account]) -> None:
        self._accounts = tuple(accounts)
        self._counted: dict[str, int] = {}

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts)

    def __len__(self) -> int:
        return len(self._accounts)

    def costs(self, pages: Sequence[int]) -> list[int]:
        """Bytes of ``pages[g]`` page indices of every geometry, in every account."""
        return [account.cost(pages) for account in self._accounts]

    def lease(self, pages: Sequence[int], urgent: bool = False) -> bool:
        """Lease ``pages[g]`` page indices of every geometry; False leaves nothing leased."""
        return self.lease_bytes(self.costs(pages), urgent)

    def lease_bytes(self, amounts: Sequence[int], urgent: bool = False) -> bool:
        """Lease so much of every account; False leaves nothing leased.

        What is ``urgent`` keeps requests going that would be preempted without it: it yields to
        guarantees and higher priorities only.
        """
        granted: list[tuple[Account, int]] = []
        for account, amount in zip(self._accounts, amounts, strict=True):
            if not account.member.lease(amount, urgent):
                for other, held in granted:
                    other.member.release(held)
                return False
            granted.append((account, amount))
        return True

    def within_guarantee(self, amounts: Sequence[int]) -> bool:
        """Whether so much more of every account is within its guarantee."""
        infos = [account.member.info() for account in self._accounts]
        return all(
            info.leased + more <= info.guarantee for info, more in zip(infos, amounts, strict=True)
        )

    def affordable_blocks(
        self,
        uncommitted: int,
        uncommitted_pages: Sequence[int],
        reserved: Sequence[int] = (),
        urgent: bool = False,
    ) -> int:
        """How many of ``uncommitted`` blocks the ledgers could back now.

        Exact when all of them fit; else rounded down to whole blocks, not pages,
        so it never promises what a lease would refuse for more than one page.

        Args:
            uncommitted: blocks.
            uncommitted_pages: page indices of every geometry that all of them take.
            reserved: of every account, bytes that are for something else; () for none.
            urgent: as for :meth:`lease_bytes`.
        """
        blocks = uncommitted
        for account, kept in zip(self._accounts, reserved or [0] * len(self), strict=True):
            available = max(0, account.member.claimable(urgent) - kept)
            if available < account.cost(uncommitted_pages):
                blocks = min(blocks, available // max(account.block_cost, 1))
        return blocks

    def wait_for(self, pages: Sequence[int], timeout_s: float) -> bool:
        """Lease ``pages[g]``, waiting while others give memory back; False if they did not."""
        deadline = time.monotonic() + timeout_s
        bell = self.bell()
        granted = self.lease(pages)
        while not granted and time.monotonic() < deadline:
            self.set_demand(self.costs(pages), 1)
            for account in self._accounts:
                account.member.ask()  # plans anew: who does not answer is passed over
            bell.wait(20)
            granted = self.lease(pages)
        if timeout_s:
            self.set_demand([0] * len(self), 0)
        return granted

    def bell(self) -> Bell:
        """Rings when a ledger has news for this engine."""
        return Bell(self._accounts[0].member if self._accounts else None)

    def bell_count(self) -> int:
        """Grows with every news of any ledger for this engine."""
        return sum(account.member.bell for account in self._accounts)

    def set_demand(self, amounts: Sequence[int], waiting: int) -> None:
        """Tell the other members how many bytes of every account this engine waits for; zeros
        withdraw it.
        """
        for account, amount in zip(self._accounts, amounts, strict=True):
            account.member.set_demand(amount, waiting)

    def others_wait(self) -> bool:
        """Whether another member of any ledger waits for memory."""
        return any(account.ledger.total_demand(account.member.slot) for account in self._accounts)

    def waiting_behind(self) -> int:
        """How many members wait for memory of some ledger and come after this one in its table."""
        return max(
            (
                sum(
                    other.alive and other.demand > 0 and other.slot > account.member.slot
                    for other in account.ledger.members()
                )
                for account in self._accounts
            ),
            default=0,
        )

    def rivals_before(self) -> int:
        """How many members of no lower priority come before this one in some ledger's table."""
        slots = [(account.member.slot, self._rivals(account)) for account in self._accounts]
        return max((sum(r.slot < slot for r in rivals) for slot, rivals in slots), default=0)

    def rivals_wait(self) -> bool:
        """Whether members of no lower priority wait for memory of some ledger."""
        return any(rival.demand > 0 for a in self._accounts for rival in self._rivals(a))

    def _rivals(self, account: Account) -> list[MemberInfo]:
        own = account.member.info()
        return [
            other
            for other in account.ledger.members()
            if other.alive and other.slot != own.slot and other.priority >= own.priority
        ]

    def calm(self) -> bool:
        """Whether nobody wants anything of this engine, in any ledger; takes no lock."""
        return all(account.member.calm() for account in self._accounts)

    def touch(self) -> None:
        """A step runs: this engine is not idle."""
        for account in self._accounts:
            account.member.touch()

    def note_preemption(self, num_bytes: int) -> None:
        for account in self._accounts:
            account.ledger.note("preempt", account.member.slot, num_bytes)

    def time(self, kind: str, seconds: float) -> None:
        """Add to a histogram of the ledgers: ``map``, ``step``, ``wait`` or ``reclaim``."""
        for account in self._accounts:
            account.member.time(kind, seconds)

    def count(self, totals: Mapping[str, int]) -> None:
        """Bring the ledgers' counters up to ``totals``; those they do not keep are left out."""
        for name in ("cache_hits", "cache_evictions", "preemptions", "shortages"):
            more = totals[name] - self._counted.get(name, 0)
            if more:
                self._counted[name] = totals[name]
                for account in self._accounts:
                    account.member.count(name, more)

    def close(self) -> None:
        for account in self._accounts:
            account.member.leave()
