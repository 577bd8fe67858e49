# SPDX-License-Identifier: Apache-2.0
"""The scheduler half: what is promised, which blocks are backed, what workers do.

The engine's scheduler asks for blocks; this half leases the bytes first, then
marks the blocks committed, and ships the block ids with the step the engine
sends anyway.  It never talks to a driver, so it needs no GPU context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ._core import BlockAllocator, Geometry
from .accounts import Account, Accounts
from .decay import LowWater
from .free_queue import BlockList, ElasticFreeQueue
from .plan import ArenaShape, BlockRanges, StepOps
from .usage import DeviceUsage
from .watcher import Watcher

_USAGE_PERIOD_S = 0.1


def geometry_of(shape: ArenaShape) -> Geometry:
    return Geometry(shape.block_bytes, shape.page_bytes, shape.num_blocks, shape.segments)


class ElasticScheduler:
    """Capacity of one engine; single-threaded but for :meth:`wants_step`.

    Args:
        num_blocks: virtual blocks, the null block (id 0) among them.
        shapes: the distinct arena shapes of the ranks, largest block first.
        accounts: this engine's memberships.
        parked_bytes: what an idle engine keeps mapped, in bytes of the first shape.
        ahead_bytes: what a growing engine keeps committed ahead, likewise.
        decay_s: how long pages beyond ``parked_bytes`` stay unused first.
        usages: driver totals for accounts that sit on a GPU, or None.

    Raises:
        MemoryError: not even the null block can be leased.
    """

    def __init__(
        self,
        num_blocks: int,
        shapes: Sequence[ArenaShape],
        accounts: Sequence[Account],
        *,
        parked_bytes: int = 0,
        ahead_bytes: int = 0,
        decay_s: float = 2.0,
        usages: Sequence[DeviceUsage | None] = (),
    ) -> None:
        geometries = [geometry_of(shape) for shape in shapes]
        self.allocator = BlockAllocator(num_blocks, geometries)
        self.accounts = Accounts(accounts)
        self.queue: ElasticFreeQueue | None = None
        self._num_geometries = len(geometries)
        self._total_pages = [g.pages_per_segment for g in geometries]
        self._page_bytes = shapes[0].page_bytes * shapes[0].segments
        self._block_bytes = shapes[0].block_bytes * shapes[0].segments
        self._parked_pages = -(-parked_bytes // self._page_bytes)
        self._ahead_blocks = -(-ahead_bytes // self._block_bytes) if ahead_bytes else 0
        self._decay = LowWater(decay_s)
        self._usages = tuple(usages)
        self._usage_at = 0.0
        self._commit: BlockRanges = []
        self._shortage = 0
        self._demand = 0
        self._settling = False
        self._watcher: Watcher | None = None
        self._counters = dict.fromkeys(
            ("committed_pages", "decommitted_pages", "reclaim_steps", "shortages"), 0
        )
        self.refresh_usage(force=True)
        first = [self.allocator.committed_pages(g) for g in range(self._num_geometries)]
        if not self.accounts.lease(first):
            raise MemoryError("not even the null block's page can be leased")

    def free_queue(
        self, blocks: Sequence[Any], cached: BlockList, evict: Callable[[Any], object]
    ) -> ElasticFreeQueue:
        """Make the engine's free queue; called once, by its block pool."""
        self.queue = ElasticFreeQueue(self, blocks, cached, evict)
        return self.queue

    # -- growing --------------------------------------------------------------

    def growable_blocks(self) -> int:
        """Uncommitted blocks the ledgers could back now."""
        allocator = self.allocator
        uncommitted = allocator.num_uncommitted
        if not uncommitted:
            return 0
        left = [total - allocator.committed_pages(g) for g, total in enumerate(self._total_pages)]
        return self.accounts.affordable_blocks(uncommitted, left)

    def grow(self, num_blocks: int) -> int:
        """Commit up to ``num_blocks`` more blocks for this step; return how many came."""
        ranges = self._grow(num_blocks)
        self._commit += ranges
        return sum(end - start for start, end in ranges)

    def _grow(self, num_blocks: int) -> BlockRanges:
        self.refresh_usage()
        num_blocks = min(num_blocks, self.allocator.num_uncommitted)
        ranges: BlockRanges = []
        while num_blocks > 0:
            growth = self.allocator.grow(num_blocks)
            if self.accounts.lease(growth.page_delta):
                self._counters["committed_pages"] += sum(growth.page_delta)
                return ranges + growth.ranges
            self.allocator.undo(growth)
            # Not all: take what there is, and halve if that was too hopeful.
            growable = self.growable_blocks()
            num_blocks = growable if growable < num_blocks else num_blocks // 2
        return ranges

    def note_shortage(self, num_blocks: int) -> None:
        """The engine was short of that many blocks; other members hear of it."""
        self._shortage = max(self._shortage, num_blocks)
        self._counters["shortages"] += 1
        self._post_demand(self._shortage)

    def _post_demand(self, num_blocks: int) -> None:
        if num_blocks != self._demand:
            self._demand = num_blocks
            self.accounts.set_demand(self.allocator.cost(num_blocks))

    # -- shrinking ------------------------------------------------------------

    def take_ops(self) -> StepOps:
        """Close a scheduling pass: what its workers commit and decommit.

        Call exactly once per step that is sent, after all its blocks were taken.
        """
        now = time.monotonic()
        if self.queue is not None:
            self.queue.sweep()
        grew = bool(self._commit)
        decommit = self._shrink(self._pages_to_give(now))
        ahead = self._commit_ahead() if grew and not decommit and not self._shortage else []
        self._settling = bool(decommit) or any(self._on_its_way(a) for a in self.accounts)
        commit, self._commit = self._commit, []
        self._post_demand(self._shortage)
        self._shortage = 0
        self._publish()
        return StepOps(commit, ahead, decommit)

    def _commit_ahead(self) -> BlockRanges:
        missing = self._ahead_blocks - self.allocator.num_clean
        # Never take the last bytes for a guess: others may need them now.
        if missing <= 0 or self.growable_blocks() < 4 * missing:
            return []
        return self._grow(missing)

    def _pages_to_give(self, now: float) -> int:
        parked = self.allocator.parked_pages
        aged = self._decay.observe(max(parked - self._parked_pages, 0), now)
        asked = self._pages_asked()
        if asked > parked and self.queue is not None:
            self.queue.evict_until(asked)
        if asked:
            self._counters["reclaim_steps"] += 1
        return max(asked, aged)

    def _pages_asked(self) -> int:
        """Pages other members wait for and the ledger does not have."""
        pages = 0
        for account in self.accounts:
            demand = account.ledger.total_demand(account.member.slot)
            if not demand:
                continue
            missing = demand - account.ledger.available() - self._on_its_way(account)
            if missing > 0:
                pages = max(pages, -(-missing // max(account.page_cost[0], 1)))
        return pages

    def _on_its_way(self, account: Account) -> int:
        """Bytes decommitted here that the workers have not released yet."""
        committed = [self.allocator.committed_pages(g) for g in range(self._num_geometries)]
        return max(0, account.member.info().leased - account.cost(committed))

    def _shrink(self, pages: int) -> BlockRanges:
        if pages <= 0:
            return []
        shrunk = self.allocator.shrink(pages * self._page_bytes)
        self._counters["decommitted_pages"] -= sum(shrunk.page_delta)
        return shrunk.ranges

    # -- around the step ------------------------------------------------------

    def wants_step(self) -> bool:
        """Whether a step with no tokens should be run to give memory back.

        Safe to call from another thread: it reads counters only.
        """
        if self._commit:
            return True
        if self._settling and not any(self._on_its_way(a) for a in self.accounts):
            return True  # so that the engine's metrics tell what the workers have released
        unused = self.allocator.parked_pages
        if unused > self._parked_pages and self._decay.is_due(time.monotonic()):
            return True
        cached = self.queue.num_cached if self.queue is not None else 0
        return bool(unused or cached) and self._pages_asked() > 0

    def refresh_usage(self, force: bool = False) -> None:
        """Publish the driver's totals to the ledgers, at most every 100 ms."""
        now = time.monotonic()
        if not self._usages or (now - self._usage_at < _USAGE_PERIOD_S and not force):
            return
        self._usage_at = now
        for account, usage in zip(self.accounts, self._usages, strict=True):
            if usage is not None:
                account.ledger.set_device_used(usage.used_bytes())

    def _publish(self) -> None:
        parked = self.allocator.parked_pages
        cached = self.queue.num_cached if self.queue is not None else 0
        for account in self.accounts:
            account.member.set_parked(parked * account.page_cost[0])
            account.member.set_cached(cached * account.block_cost)

    def stats(self) -> dict[str, float]:
        """Bytes over all ledgers and counts since start, for the engine's metrics."""
        totals = dict.fromkeys(
            ("capacity", "available", "leased", "committed", "parked", "cached"), 0.0
        )
        for account in self.accounts:
            info = account.member.info()
            totals["capacity"] += account.ledger.capacity
            totals["available"] += account.ledger.available()
            for name in ("leased", "committed", "parked", "cached"):
                totals[name] += getattr(info, name)
        stats = {f"{name}_bytes": value for name, value in totals.items()}
        stats.update({name: float(value) for name, value in self._counters.items()})
        return stats

    def watch(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, from another thread, whenever :meth:`wants_step` is true."""
        self._watcher = Watcher(self, wake)

    def close(self) -> None:
        """Leave the ledgers; the bytes return once every worker has left as well."""
        if self._watcher is not None:
            self._watcher.stop()
        self.accounts.close()
