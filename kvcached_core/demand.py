# SPDX-License-Identifier: Apache-2.0
"""What an engine waits for: the memory of all requests it cannot admit yet."""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from .accounts import Accounts
from .pool import Pool

_LOOK_AT_MOST = 256
"""Waiting requests whose need is added up; the rest waits behind them anyway."""
_HOLD_S = 1.0
"""A pass may be full without a look at the queue: what waits is believed to wait this long."""
_REFRESH_S = 0.5
"""A demand is posted anew this often, since one that nobody refreshes is taken for withdrawn."""


Needs = list[int]
"""Blocks of every pool."""


class Request(Protocol):
    """What this module needs of the engine's request object."""

    @property
    def num_tokens(self) -> int: ...

    num_computed_tokens: int


class Demand:
    """Follows shortages pass by pass and posts them in the ledgers.

    Args:
        accounts: where it is posted.
        pools: of the engine, all of which a request needs.
    """

    def __init__(self, accounts: Accounts, pools: Sequence[Pool]) -> None:
        self.waiting = 0
        """Requests that wait for memory, as of the last pass."""
        self._accounts = accounts
        self._pools = pools
        self._queue: Iterable[Request] = ()
        self._short: Needs = []
        self._posted: tuple[Needs, int] = ([], 0)
        self._posted_at = 0.0
        self._short_at = -math.inf
        self._since: float | None = None

    def begin(self, waiting: Iterable[Request]) -> None:
        """A scheduling pass begins; these requests wait in the engine's queue."""
        self._queue = waiting

    def note(self, needs: Sequence[int]) -> None:
        """An allocation was short of so many blocks of every pool."""
        self._short = _each(max, self._short, needs)
        # At once: the engine may be about to preempt its own requests.
        self._post(_each(max, self._short, self._posted[0]), max(1, self._posted[1]))

    def met(self, came: Sequence[int]) -> None:
        """So many blocks of every pool have come: nobody is to give them a second time."""
        needs, waiting = self._posted
        if needs:
            left = [max(0, blocks) for blocks in _each(operator.sub, needs, came)]
            self._post(left if any(left) else [], waiting if any(left) else 0)

    def withdraw(self) -> None:
        """Nothing is waited for just now, whatever was short in this pass."""
        self._short = []
        self._post([], 0)

    @property
    def short(self) -> bool:
        """Whether something was short in this pass."""
        return bool(self._short)

    @property
    def idle(self) -> bool:
        """Whether nothing is short, or was of late, so that nothing is posted."""
        return not self._short and self._since is None

    def end(self) -> bool:
        """The pass is over; post what it could not have. True if there was a shortage."""
        short, self._short = self._short, []
        now = time.monotonic()
        if not any(short) and now - self._short_at < _HOLD_S:
            queued = list(itertools.islice(self._queue, _LOOK_AT_MOST))
            if queued:
                # Not all of it may be waiting still: some was admitted, some was given up.
                self.waiting = min(self.waiting, len(queued))
                needs, waiting = self._posted
                self._post(_each(min, needs, self._all(queued)), min(waiting, len(queued)))
                return False
        if not any(short):
            self._post([], 0)
            if self._since is not None:
                self._accounts.time("wait", now - self._since)
                self._since = None
            self.waiting = 0
            return False
        self._short_at = now
        if self._since is None:
            self._since = now
        # The first is what was short; those behind it want theirs as well.
        behind = list(itertools.islice(self._queue, 1, _LOOK_AT_MOST))
        self.waiting = len(behind) + 1
        self._post(_each(operator.add, short, self._all(behind)), self.waiting)
        return True

    def _all(self, requests: Sequence[Request]) -> Needs:
        return [sum(pool.holding.blocks_of(r.num_tokens) for r in requests) for pool in self._pools]

    def _post(self, needs: Needs, waiting: int) -> None:
        now = time.monotonic()
        if (needs, waiting) == self._posted and (
            not any(needs) or now - self._posted_at < _REFRESH_S
        ):
            return
        self._posted, self._posted_at = (needs, waiting), now
        self._accounts.set_demand(self.costs(needs), waiting)

    def costs(self, needs: Sequence[int]) -> list[int]:
        """Bytes of every account that so many blocks of every pool take."""
        totals = [0] * len(self._accounts)
        for pool, blocks in zip(self._pools, needs, strict=False):
            if blocks > 0:
                totals = _each(operator.add, totals, pool.cost(blocks))
        return totals

    def last_requests(self, running: Sequence[Request], num_bytes: int) -> int:
        """How many requests at the end of ``running`` hold so much; all, if none would.

        Args:
            running: requests, the first to go at the end.
            num_bytes: of the pools' first shapes.
        """
        held = 0
        for count, request in enumerate(reversed(running), 1):
            tokens = request.num_computed_tokens
            held += sum(pool.holding.blocks_of(tokens) * pool.block_bytes for pool in self._pools)
            if held >= num_bytes:
                return count
        return len(running)


def next_blocks(pool: Pool, running: Sequence[Request]) -> int:
    """Blocks the running requests may take in this pass: theirs before anybody else's."""
    # Exactly: one block for each would keep more than what a finished request leaves.
    return sum(
        pool.holding.next_blocks_of(
            request.num_computed_tokens, max(request.num_tokens, request.num_computed_tokens) + 1
        )
        for request in running
    )


def _each(combine: Callable[[int, int], int], a: Sequence[int], b: Sequence[int]) -> Needs:
    """Of every pool, where a missing number is nothing."""
    return [combine(x, y) for x, y in itertools.zip_longest(a, b, fillvalue=0)]
