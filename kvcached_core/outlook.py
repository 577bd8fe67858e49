# SPDX-License-Identifier: Apache-2.0
"""What the running requests will take yet, and no new request gets.

Engines that share memory let requests in while there is any.  Without this the last free page would
go to a prompt, the next token of another request would find none, and what is preempted for it
computes its prompt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .demand import Request
from .pool import Pool

_LEAST_TOKENS = 64
"""A request is likely to generate so many more, if it may."""


class Generating(Request, Protocol):
    """A request of an engine that takes its blocks one after the other."""

    @property
    def num_output_tokens(self) -> int: ...

    max_tokens: int


class Outlook:
    """Reckons once in a pass, when first asked.

    How long answers get nobody knows, and what a request may generate is often as much as its model
    can.  So each is taken to be through with half of its answer, or less of a short one.

    Args:
        pool: whose blocks are meant.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._new = pool.holding.next_blocks_of(0, _LEAST_TOKENS)
        """Blocks of a request that has generated nothing."""
        self._running: Sequence[Generating] = ()
        self._reckoned: tuple[int, int] | None = None
        """For how many requests, and their blocks."""

    def begin(self, running: Sequence[Generating]) -> None:
        """A pass begins; ``running`` gets what is let in in it."""
        self._running = running
        self._reckoned = None

    def blocks(self, spare: int) -> int:
        """Likely to be taken; 0, with no closer look, where ``spare`` ones are more than enough."""
        count = len(self._running)
        # Nobody generated more than is held, so that at most doubles.
        held = self._pool.allocator.num_live - self._pool.num_cached
        if spare >= held + count * self._new:
            return 0
        if self._reckoned is None:
            self._reckoned = count, sum(map(self._blocks_of, self._running))
        counted, blocks = self._reckoned
        return blocks + (count - counted) * self._new

    def _blocks_of(self, request: Generating) -> int:
        generated = request.num_output_tokens
        more = min(max(generated, _LEAST_TOKENS), max(0, request.max_tokens - generated))
        tokens = request.num_tokens
        return self._pool.holding.next_blocks_of(tokens, tokens + more)
