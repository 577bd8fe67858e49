# SPDX-License-Identifier: Apache-2.0
"""What an engine waits for: the memory of all requests it cannot admit yet."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from .accounts import Accounts

_LOOK_AT_MOST = 256
"""Waiting requests whose need is added up; the rest waits behind them anyway."""
_HOLD_S = 1.0
"""A pass may be full without a look at the queue: what waits is believed to wait this long."""
_REFRESH_S = 0.5
"""A demand is posted anew this often, since one that nobody refreshes is taken for withdrawn."""


class Request(Protocol):
    """What this module needs of the engine's request object."""

    @property
    def num_tokens(self) -> int: ...

    num_computed_tokens: int


class Demand:
    """Follows shortages pass by pass and posts them in the ledgers.

    Args:
        accounts: where it is posted.
        cost: pages of every geometry that a number of blocks would take.
        block_tokens: tokens one block holds, over all KV groups.
    """

    def __init__(
        self, accounts: Accounts, cost: Callable[[int], Sequence[int]], block_tokens: float
    ) -> None:
        self.waiting = 0
        """Requests that wait for memory, as of the last pass."""
        self._accounts = accounts
        self._cost = cost
        self._block_tokens = block_tokens
        self._queue: Iterable[Request] = ()
        self._short = 0
        self._posted = (0, 0)
        self._posted_at = 0.0
        self._short_at = -math.inf
        self._since: float | None = None

    def blocks(self, tokens: int) -> int:
        """Blocks that hold ``tokens``."""
        return int(-(-tokens // self._block_tokens))

    def begin(self, waiting: Iterable[Request]) -> None:
        """A scheduling pass begins; these requests wait in the engine's queue."""
        self._queue = waiting

    def note(self, num_blocks: int) -> None:
        """An allocation was short of that many blocks."""
        self._short = max(self._short, num_blocks)
        # At once: the engine may be about to preempt its own requests.
        self._post(max(self._short, self._posted[0]), max(1, self._posted[1]))

    def end(self) -> bool:
        """The pass is over; post what it could not have. True if there was a shortage."""
        short, self._short = self._short, 0
        now = time.monotonic()
        if not short and now - self._short_at < _HOLD_S:
            queued = [
                self.blocks(r.num_tokens) for r in itertools.islice(self._queue, _LOOK_AT_MOST)
            ]
            if queued:
                # Not all of it may be waiting still: some was admitted, some was given up.
                self.waiting = min(self.waiting, len(queued))
                self._post(min(self._posted[0], sum(queued)), min(self._posted[1], len(queued)))
                return False
        if not short:
            self._post(0, 0)
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
        self._post(short + sum(self.blocks(r.num_tokens) for r in behind), self.waiting)
        return True

    def _post(self, num_blocks: int, waiting: int) -> None:
        now = time.monotonic()
        if (num_blocks, waiting) == self._posted and (
            not num_blocks or now - self._posted_at < _REFRESH_S
        ):
            return
        self._posted, self._posted_at = (num_blocks, waiting), now
        self._accounts.set_demand(self._cost(num_blocks), waiting)

    def next_blocks(self, running: Sequence[Request]) -> int:
        """Blocks the running requests may take in this pass: theirs before anybody else's."""
        # Exactly: one block for each would keep more than what a finished request leaves.
        return sum(
            self.blocks(max(request.num_tokens, request.num_computed_tokens) + 1)
            - self.blocks(request.num_computed_tokens)
            for request in running
        )

    def last_requests(self, running: Sequence[Request], num_blocks: int) -> int:
        """How many requests at the end of ``running`` hold ``num_blocks``; all, if none would."""
        held = 0
        for count, request in enumerate(reversed(running), 1):
            held += self.blocks(request.num_computed_tokens)
            if held >= num_blocks:
                return count
        return len(running)
