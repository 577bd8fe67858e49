# SPDX-License-Identifier: Apache-2.0
"""How much an engine takes next, so that it is mapped while the device still computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .demand import Request, next_blocks
from .pool import Pool

_LOOK_AT_MOST = 64
"""Waiting requests that a pass may let in, as far as this module is concerned."""


class Forecast:
    """Follows how fast what is in use of one pool grows, pass by pass."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._used = self._used_now()
        self._grew = 0
        self._most = 0
        """Blocks by which a pass grew lately: the most, forgotten by an eighth a pass."""

    def _used_now(self) -> tuple[int, int]:
        """Blocks in use, and those of the pages in use: nobody else has them for the time being."""
        pool = self._pool
        pages = pool.allocator.committed_pages(0) - pool.allocator.parked_pages
        return pool.allocator.num_live, pages * pool.blocks_per_page

    def observe(self, apart: bool) -> None:
        """A pass has taken its blocks, on pages that belong to one request each or not."""
        before, self._used = self._used, self._used_now()
        self._grew = max(0, self._used[apart] - before[apart])
        self._most = max(self._grew, self._most * 7 // 8)

    def wanted(
        self,
        least: int,
        spare: int,
        mapping: bool,
        running: Sequence[Request],
        waiting: Iterable[Request],
    ) -> int:
        """Clean blocks to have for later passes; 0 if there are enough, or none will be taken.

        Args:
            least: for a pool that grows at all; 0 switches forecasts off.
            spare: clean blocks this pass leaves.
            mapping: whether memory is mapped in this pass anyway.
            running: the engine's running requests, those let in by this pass among them.
            waiting: those it may let in next.
        """
        if not least or not (self._grew or mapping):
            return 0
        wanted = max(least, 2 * self._most)
        # Half is what one pass took lately: the next one finds it, and more is there by then.
        if spare >= (wanted if mapping else wanted // 2):
            return 0
        if wanted == least:
            return least
        return max(least, min(wanted, self._upcoming(running, waiting)))

    def _upcoming(self, running: Sequence[Request], waiting: Iterable[Request]) -> int:
        """Blocks that those requests are still to take for tokens they have already."""
        # The engine counts the tokens of this pass as computed only later.
        left = max(0, next_blocks(self._pool, running) - self._grew)
        first = itertools.islice(waiting, _LOOK_AT_MOST)
        return left + sum(self._pool.holding.blocks_of(request.num_tokens) for request in first)
