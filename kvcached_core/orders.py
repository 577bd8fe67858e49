# SPDX-License-Identifier: Apache-2.0
"""What operators ask of an engine at run time, and the answer that it is so."""

from __future__ import annotations

from collections.abc import Iterator

from .accounts import Accounts


class Orders:
    """Policies and trims of every ledger this engine is in.

    A trim is carried out by a scheduling pass and acknowledged once the pass has ended and its
    pages are back.  Only :meth:`begin` and :meth:`finish` change anything here: the pass calls
    them, and the rest is safe to call from another thread meanwhile.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._begun: dict[int, int] = {}
        self._finished: dict[int, int] = {}

    def has_new(self) -> bool:
        """Whether a trim waits for a pass to carry it out."""
        return any(True for _ in self._new())

    def begin(self, page_bytes: int, prices: Accounts, most_bytes: int) -> tuple[int, bool]:
        """Bytes operators want back, ``most_bytes`` at most, and whether cached blocks may go for
        them; every trim is told once.

        Args:
            page_bytes: of the least page that can be given, on one rank.
            prices: what that page costs in every account.
            most_bytes: all there is.
        """
        num_bytes, with_cache = 0, False
        costs = [max(account.page_cost[0], 1) for account in prices]
        begun = dict(self._begun)
        for index, version, trimmed, cached in self._new():
            begun[index] = version
            wanted = -(-trimmed // costs[index]) * page_bytes if trimmed >= 0 else most_bytes
            num_bytes, with_cache = max(num_bytes, wanted), with_cache or cached
        self._begun = begun
        return num_bytes, with_cache

    def finish(self) -> None:
        """The pass that began them is over and what it gave back is published."""
        self._finished = self._begun

    def cache_limits(self) -> list[int | None]:
        """Bytes that may stay cached, of every account; None for no bound."""
        return [account.member.policy().cache_limit for account in self._accounts]

    def acknowledge(self, cache_fits: bool, settling: bool) -> None:
        """Tell controllers what has taken effect.

        Args:
            cache_fits: no more is cached than :meth:`cache_limits` allow.
            settling: pages given back are not released by their workers yet.
        """
        for index, account in enumerate(self._accounts):
            member = account.member
            policy = member.policy()
            if policy.version == policy.observed and policy.trim is None:
                continue
            if cache_fits and (policy.limit is None or member.info().leased <= policy.limit):
                member.observe(policy.version)
            if policy.trim is not None and not settling:
                version = policy.trim[0]
                if version == self._finished.get(index):
                    member.trim_done(version)

    def _new(self) -> Iterator[tuple[int, int, int, bool]]:
        """Trims no pass has begun: account, version, bytes (-1: all), cached blocks too."""
        for index, account in enumerate(self._accounts):
            trim = account.member.policy().trim
            if trim is not None and trim[0] != self._begun.get(index):
                yield (index, *trim)
