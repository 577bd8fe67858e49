# SPDX-License-Identifier: Apache-2.0
"""One pool of an engine: blocks of one size, which of them have memory, and what that costs.

Most engines have one.  Models whose layers keep different things, all tokens, a window of them or
a state, have one for each: they share the engine's membership in the ledgers, its lease, its policy
and its demand, but every pool grows and shrinks for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ._core import BlockAllocator, Geometry, Growth
from .accounts import Account, Accounts
from .decay import LowWater
from .holding import Holding
from .plan import ArenaShape, BlockRanges


def geometry_of(shape: ArenaShape) -> Geometry:
    return Geometry(shape.block_bytes, shape.page_bytes, shape.num_blocks, shape.segments)


def pages_filled(allocator: BlockAllocator, num_blocks: int) -> int:
    """Whole pages of the first geometry in so many blocks, which need not fill theirs evenly."""
    geometry = allocator.geometries[0]
    return num_blocks * geometry.block_bytes // geometry.page_bytes


class CachedBlocks(Protocol):
    """The unreferenced blocks an engine keeps for their content, and gives up when told."""

    @property
    def num_cached(self) -> int: ...

    def sweep(self) -> None:
        """Hand over what lost its content without being told."""

    def empty_pages(self, num_pages: int) -> None:
        """Evict what empties that many more pages, or as many as can be."""

    def evict_down_to(self, num_blocks: int) -> None:
        """Evict until at most that many blocks are cached."""


class Pool:
    """The blocks, their price, and what a pass does to them.

    Args:
        num_blocks: virtual blocks, the null block (id 0) among them.
        shapes: the distinct arena shapes of the ranks, largest block first.
        accounts: the engine's memberships, priced for these blocks.
        holding: what a request holds of them.
        decay_s: how long pages stay unused before they are given back.
    """

    def __init__(
        self,
        num_blocks: int,
        shapes: Sequence[ArenaShape],
        accounts: Sequence[Account],
        holding: Holding,
        *,
        decay_s: float,
    ) -> None:
        geometries = [geometry_of(shape) for shape in shapes]
        self.allocator = BlockAllocator(num_blocks, geometries)
        self.accounts = Accounts(accounts)
        self.holding = holding
        self.cache: CachedBlocks | None = None
        self.decay = LowWater(decay_s)
        self.page_bytes = shapes[0].page_bytes * shapes[0].segments
        """Of one page index of the first shape, as all byte counts of a pool."""
        self.block_bytes = shapes[0].block_bytes * shapes[0].segments
        self.blocks_per_page = max(1, self.page_bytes // self.block_bytes)
        self.total_pages = [g.pages_per_segment for g in geometries]
        self.commit: BlockRanges = []
        """Committed in this pass."""
        self.decommit: BlockRanges = []
        """Given up in this pass."""
        self.keep_pages = 0
        """Parked pages that this pass will use."""
        self.withheld_blocks = 0
        """Blocks that running requests must free in this pass, for others."""

    # -- what there is --------------------------------------------------------

    @property
    def num_cached(self) -> int:
        return self.cache.num_cached if self.cache is not None else 0

    @property
    def spare_pages(self) -> int:
        """Parked pages this pass can do without."""
        return max(0, self.allocator.parked_pages - self.keep_pages)

    def committed_pages(self) -> list[int]:
        """Of every geometry."""
        return [self.allocator.committed_pages(g) for g in range(len(self.total_pages))]

    def affordable_blocks(self, reserved: Sequence[int] = (), urgent: bool = False) -> int:
        """Uncommitted blocks the ledgers could back now.

        Args:
            reserved: of every account, bytes that are for something else.
            urgent: whether running requests are preempted without them.
        """
        uncommitted = self.allocator.num_uncommitted
        committed = self.committed_pages()
        left = [all_ - now for all_, now in zip(self.total_pages, committed, strict=True)]
        return self.accounts.affordable_blocks(uncommitted, left, reserved, urgent)

    @property
    def apart_blocks(self) -> int:
        """Clean blocks on pages with no live block, about: a request has such a page for itself."""
        return self.allocator.parked_pages * self.blocks_per_page

    # -- sizes ----------------------------------------------------------------

    def blocks_on(self, pages: int) -> int:
        """Blocks that fill so many pages."""
        return self.blocks_in(pages * self.page_bytes)

    def blocks_in(self, num_bytes: int) -> int:
        """Blocks that fill so many bytes."""
        return -(-num_bytes // self.block_bytes)

    def pages_in(self, num_bytes: int) -> int:
        """Pages that have so many bytes."""
        return -(-num_bytes // self.page_bytes)

    def pages_for(self, blocks: int) -> int:
        """Parked pages that have so many blocks, wherever these lie on them."""
        # A block may be larger than a page, and a page need not be full of whole blocks.
        filled = -(-blocks * self.block_bytes // self.page_bytes)
        return max(filled, -(-blocks // self.blocks_per_page))

    def cost(self, blocks: int) -> list[int]:
        """Bytes that so many more blocks would take of every account."""
        return self.accounts.costs(self.allocator.cost(blocks))

    # -- what changes ---------------------------------------------------------

    def grow(self, num_blocks: int, urgent: bool = False) -> tuple[int, Growth | None]:
        """Lease and commit up to so many more blocks; return how many were asked for at last."""
        num_blocks = min(num_blocks, self.allocator.num_uncommitted)
        while num_blocks > 0:
            growth = self.allocator.grow(num_blocks)
            if self.accounts.lease(growth.page_delta, urgent):
                return num_blocks, growth
            self.allocator.undo(growth)
            # Not all: take what there is, and halve if that was too hopeful.
            growable = self.affordable_blocks(urgent=urgent)
            num_blocks = growable if growable < num_blocks else num_blocks // 2
        return 0, None

    def take_ranges(self) -> tuple[BlockRanges, BlockRanges]:
        """What this pass committed and gave up; the next one begins with nothing."""
        taken = self.commit, self.decommit
        self.commit, self.decommit = [], []
        return taken
