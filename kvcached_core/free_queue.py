# SPDX-License-Identifier: Apache-2.0
"""The free queue of an engine whose memory grows and shrinks.

It stands where the engine's own free-block queue stands and keeps its order of
preference: blocks freed without content, then blocks never used, then cached
blocks in least-recently-used order.  The difference is where they come from:
the first two are the block allocator's, which knows pages, and only the cached
ones are a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .pool import pages_filled

if TYPE_CHECKING:
    from .scheduler import ElasticScheduler


class Block(Protocol):
    """What this module needs of the engine's block object."""

    block_id: int
    next_free_block: Any

    @property
    def block_hash(self) -> Any: ...


class BlockList(Protocol):
    """The engine's own linked list, here for cached blocks only."""

    num_free_blocks: int
    fake_free_list_head: Any
    fake_free_list_tail: Any

    def popleft(self) -> Any: ...
    def popleft_n(self, n: int) -> list[Any]: ...
    def remove(self, block: Any) -> None: ...
    def append(self, block: Any) -> None: ...
    def append_n(self, blocks: list[Any]) -> None: ...
    def get_all_free_blocks(self) -> list[Any]: ...


class ElasticFreeQueue:
    """Free blocks of an elastic pool; drop-in for the engine's free queue.

    Args:
        scheduler: grows and shrinks the committed part of the pool.
        blocks: the engine's block objects, indexed by block id; id 0 is the null block.
        cached: an empty instance of the engine's own queue, for cached blocks.
        evict: removes a block from the prefix cache (and emits its events).
    """

    def __init__(
        self,
        scheduler: ElasticScheduler,
        blocks: Sequence[Any],
        cached: BlockList,
        evict: Callable[[Any], object],
    ) -> None:
        self._scheduler = scheduler
        self._allocator = scheduler.allocator
        self._blocks = blocks
        self._cached = cached
        self._evict = evict
        self._null_block_taken = False

    # -- counts ---------------------------------------------------------------

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold a reusable prefix."""
        return self._cached.num_free_blocks

    @property
    def num_ready(self) -> int:
        """Free blocks that can be handed out with no lease."""
        return self._allocator.num_clean + self._cached.num_free_blocks

    @property
    def num_free_blocks(self) -> int:
        """Free blocks, with those the ledgers could back right now.

        An estimate for admission: another engine may take the memory first.
        :meth:`ensure` is the promise.
        """
        return self.num_ready + self._scheduler.growable_blocks()

    @property
    def num_used_blocks(self) -> int:
        """Blocks that are referenced, the null block among them."""
        return self._allocator.num_live - self._cached.num_free_blocks

    def usage(self) -> float:
        """Used share of what this engine could have now, 0 to 1, without the null block.

        It reaches 1 exactly when there is no block more to be had, whatever the
        size of the virtual range. What the ledgers could back is as of a few passes ago where
        nobody is short of memory.
        """
        used = self.num_used_blocks - 1
        reachable = used + self.num_ready + self._scheduler.growable_lately
        return used / reachable if reachable else 0.0

    def lacks(self, num_blocks: int, running: bool = False) -> bool:
        """Whether fewer than ``num_blocks`` are free; the other members hear of it.

        A new request lacks what running ones are likely to take, too.

        An engine asks this for each running request in every pass, so what the ledgers could back,
        which takes some microseconds to learn, is looked at only where it decides.

        Args:
            num_blocks: how many.
            running: whether they are for a running request.
        """
        if num_blocks <= 0:
            return False
        if not running:
            num_blocks += self._scheduler.blocks_to_come(self.num_ready - num_blocks)
        missing = num_blocks - self.num_ready
        if missing <= 0:
            return False
        if self._scheduler.rivals.turns_away(running):
            return True
        if missing <= self._scheduler.growable_blocks(urgent=running):
            return False
        self._scheduler.note_shortage(missing)
        return True

    def ensure(
        self, num_blocks: int, computed: Sequence[Sequence[Any]] = (), running: bool = False
    ) -> bool:
        """Make sure ``num_blocks`` can be taken now; lease and grow as needed.

        Args:
            num_blocks: blocks the engine is about to take, including those of
                ``computed`` that are free.
            computed: prefix-cache hits, per group; the free ones are taken out of
                the cached list rather than allocated, so they need no growth.
            running: whether they are for a running request.

        Returns:
            True if they are there. False is a scheduling answer: not now.
        """
        if num_blocks <= 0:
            return True
        hits = sum(b.ref_cnt == 0 and not b.is_null for group in computed for b in group)
        wanted = num_blocks - hits
        missing = wanted - self._allocator.num_clean
        if missing <= 0 or self._cache_will_do(num_blocks):
            return True
        self._scheduler.grow(missing, urgent=running)
        available = self.num_ready - hits
        if wanted > available:
            # What the ledgers could back is not this engine's yet: it waits for that too.
            self._scheduler.note_shortage(wanted - available + self._scheduler.growable_blocks())
            return False
        return True

    # -- the engine's queue interface -----------------------------------------

    def popleft(self) -> Any:
        if not self._null_block_taken:
            # The pool asks for its null block first; it is committed and live
            # in the allocator from the start.
            self._null_block_taken = True
            return self._blocks[0]
        if not self.ensure(1):
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int, beside: int = 0) -> list[Any]:
        """Take ``n`` blocks, those of one request beside the one it took last (0: none)."""
        if self._scheduler.apart and not self._scheduler.dry:
            self._scheduler.grow_apart(n, beside)
        if n > self._allocator.num_clean and not self._cache_will_do(n):
            self._scheduler.grow(n - self._allocator.num_clean)
        take = min(n, self._allocator.num_clean)
        if not take:
            return self._cached.popleft_n(n)
        blocks = self._blocks
        if self._scheduler.apart:
            ids = self._allocator.allocate_beside(take, beside)
        else:
            ids = self._allocator.allocate(take)
        taken = [blocks[block_id] for block_id in ids]
        if take < n:
            taken += self._cached.popleft_n(n - take)
        return taken

    def _cache_will_do(self, num_blocks: int) -> bool:
        """Whether so many need no growth, which was in vain in this pass already.

        Every block that is taken while the cache has all the memory would try it twice.
        """
        return self._scheduler.dry and num_blocks <= self.num_ready

    def remove(self, block: Any) -> None:
        self._scheduler.counters["cache_hits"] += 1
        self._cached.remove(block)

    def append(self, block: Any) -> None:
        self._cached.append(block)

    def append_n(self, blocks: list[Any]) -> None:
        self._cached.append_n(blocks)

    def prepend_n(self, blocks: list[Any]) -> None:
        if blocks:
            self._allocator.free([block.block_id for block in blocks])

    def get_all_free_blocks(self) -> list[Any]:
        """Free blocks in the order they would be taken, as far as it is decided."""
        self._scheduler.grow(self._allocator.num_uncommitted)
        clean = [self._blocks[block_id] for block_id in self._allocator.free_order()]
        return clean + self._cached.get_all_free_blocks()

    @property
    def fake_free_list_head(self) -> Any:
        return self._cached.fake_free_list_head

    @property
    def fake_free_list_tail(self) -> Any:
        return self._cached.fake_free_list_tail

    # -- giving memory back ---------------------------------------------------

    def sweep(self) -> None:
        """Hand blocks that lost their cached content back to the allocator.

        The engine drops hashes in place (a reset, or a connector's bad load);
        the oldest entry tells in O(1) whether there is anything to do.
        """
        oldest = self._cached.fake_free_list_head.next_free_block
        freed = []
        while oldest is not self._cached.fake_free_list_tail and oldest.block_hash is None:
            freed.append(self._cached.popleft().block_id)
            oldest = self._cached.fake_free_list_head.next_free_block
        if freed:
            self._allocator.free(freed)

    def empty_pages(self, num_pages: int) -> None:
        """Evict cached blocks that empty ``num_pages`` more pages, or as many as they can.

        Pages empty in the order of their most recently used block, and blocks on
        pages that cannot be emptied stay.
        """
        if num_pages <= 0:
            return
        goal = self._allocator.parked_pages + num_pages
        count = 2 * self._scheduler.pools[0].blocks_on(num_pages)
        while (left := goal - self._allocator.parked_pages) > 0:
            # A cache may be much larger than what is wanted of it: no further than necessary.
            ids = self._allocator.emptied_by(self._oldest(count), left)
            for block_id in ids:
                self._cached.remove(self._blocks[block_id])
            looked_at_all = count >= self._cached.num_free_blocks + len(ids)
            self._drop(ids)
            if looked_at_all:
                return
            count *= 4

    def _oldest(self, count: int) -> list[int]:
        """Ids of so many cached blocks, the one used longest ago first."""
        ids: list[int] = []
        block = self._cached.fake_free_list_head.next_free_block
        while len(ids) < count and block is not self._cached.fake_free_list_tail:
            ids.append(block.block_id)
            block = block.next_free_block
        return ids

    def evict_down_to(self, num_blocks: int) -> None:
        """Evict until at most ``num_blocks`` are cached: whole pages first, then the oldest."""
        excess = self._cached.num_free_blocks - num_blocks
        if excess <= 0:
            return
        self.empty_pages(pages_filled(self._allocator, excess))
        excess = self._cached.num_free_blocks - num_blocks
        if excess > 0:
            self._drop([block.block_id for block in self._cached.popleft_n(excess)])

    def _drop(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._evict(self._blocks[block_id])
        if block_ids:
            self._allocator.free(block_ids)
            self._scheduler.counters["cache_evictions"] += len(block_ids)
