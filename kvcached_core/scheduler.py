# SPDX-License-Identifier: Apache-2.0
"""The scheduler half: what is promised, which blocks are backed, what workers do.

The engine's scheduler asks for blocks; this half leases the bytes first, then
marks the blocks committed, and ships the block ids with the step the engine
sends anyway.  It never talks to a driver, so it needs no GPU context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ._core import BlockAllocator, Geometry
from .accounts import Account, Accounts
from .decay import LowWater
from .demand import Demand, Request
from .free_queue import BlockList, ElasticFreeQueue
from .metrics import HISTOGRAMS, HistogramFeed
from .orders import Orders
from .plan import ArenaShape, BlockRanges, StepOps
from .usage import DeviceUsage
from .watcher import Watcher

_USAGE_PERIOD_S = 0.1
_STARVED_PAUSE_MS = 2
"""How long an engine that could run nothing for want of memory waits for some."""
_PREEMPTION_PAUSE = 3
"""Passes from one preemption for others to the next: its blocks may come back late."""


def geometry_of(shape: ArenaShape) -> Geometry:
    return Geometry(shape.block_bytes, shape.page_bytes, shape.num_blocks, shape.segments)


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


class ElasticScheduler:
    """Capacity of one engine; single-threaded but for :meth:`attend` and :meth:`wants_step`.

    A scheduling pass is :meth:`begin_pass`, the engine's own work, :meth:`take_ops`.

    Args:
        num_blocks: virtual blocks, the null block (id 0) among them.
        shapes: the distinct arena shapes of the ranks, largest block first.
        accounts: this engine's memberships.
        parked_bytes: what an idle engine keeps mapped, in bytes of the first shape.
        ahead_bytes: what a growing engine keeps committed ahead, likewise.
        decay_s: how long pages beyond ``parked_bytes`` stay unused first.
        usages: driver totals for accounts that sit on a GPU, or None.
        block_tokens: tokens one block holds for every KV group, to size demand by.
        start_wait_s: how long to wait for the first page while others give memory back.

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
        block_tokens: float = 16.0,
        start_wait_s: float = 0.0,
    ) -> None:
        geometries = [geometry_of(shape) for shape in shapes]
        self.allocator = BlockAllocator(num_blocks, geometries)
        self.accounts = Accounts(accounts)
        self.queue: CachedBlocks | None = None
        self.journal: list[tuple[str, int]] | None = None
        """What was done to the allocator and the cache, for ranks that repeat it; None: nobody."""
        self.counters = dict.fromkeys(
            (
                "committed_pages",
                "decommitted_pages",
                "reclaim_steps",
                "shortages",
                "cache_hits",
                "cache_evictions",
                "preemptions",
            ),
            0,
        )
        self._num_geometries = len(geometries)
        self._total_pages = [g.pages_per_segment for g in geometries]
        self._page_bytes = shapes[0].page_bytes * shapes[0].segments
        self._block_bytes = shapes[0].block_bytes * shapes[0].segments
        self.blocks_per_page = max(1, self._page_bytes // self._block_bytes)
        self._parked_pages = -(-parked_bytes // self._page_bytes)
        self._ahead_blocks = -(-ahead_bytes // self._block_bytes) if ahead_bytes else 0
        self._decay = LowWater(decay_s)
        self._usages = tuple(usages)
        self._usage_at = 0.0
        self._feed = HistogramFeed()
        self._commit: BlockRanges = []
        self._decommit: BlockRanges = []
        self._owed_pages = 0
        self._keep_pages = 0
        self._asked_since: float | None = None
        self._bell = self.accounts.bell()
        self._passes = 0
        self._preempted_in = -_PREEMPTION_PAUSE
        self.withheld_blocks = 0
        """Blocks that running requests must free in this pass, for others."""
        self.contended = False
        """Whether others wait for memory in this pass."""
        self._settling = False
        self._watcher: Watcher | None = None
        self._demand = Demand(self.accounts, self.allocator.cost, block_tokens)
        self._orders = Orders(self.accounts)
        self.refresh_usage(force=True)
        first = [self.allocator.committed_pages(g) for g in range(self._num_geometries)]
        if not self.accounts.wait_for(first, start_wait_s):
            raise MemoryError("not even the null block's page can be leased")
        for account in self.accounts:
            account.member.set_pinned(account.cost(first))

    def free_queue(
        self, blocks: Sequence[Any], cached: BlockList, evict: Callable[[Any], object]
    ) -> ElasticFreeQueue:
        """Make the engine's free queue; called once, by its block pool."""
        queue = ElasticFreeQueue(self, blocks, cached, evict)
        self.queue = queue
        return queue

    # -- growing --------------------------------------------------------------

    def growable_blocks(self) -> int:
        """Uncommitted blocks the ledgers could back now."""
        allocator = self.allocator
        uncommitted = allocator.num_uncommitted
        # What was given back in this pass must not come back before its workers heard of it.
        if not uncommitted or self._decommit:
            return 0
        left = [total - allocator.committed_pages(g) for g, total in enumerate(self._total_pages)]
        return self.accounts.affordable_blocks(uncommitted, left)

    @property
    def gives(self) -> bool:
        """Whether this pass gives memory back, and so can take none."""
        return bool(self._decommit)

    def grow(self, num_blocks: int) -> int:
        """Commit up to ``num_blocks`` more blocks for this step; return how many came."""
        ranges = self._grow(num_blocks)
        self._commit += ranges
        return sum(end - start for start, end in ranges)

    def _grow(self, num_blocks: int) -> BlockRanges:
        if self._decommit:
            return []
        self.refresh_usage()
        num_blocks = min(num_blocks, self.allocator.num_uncommitted)
        ranges: BlockRanges = []
        while num_blocks > 0:
            growth = self.allocator.grow(num_blocks)
            if self.accounts.lease(growth.page_delta):
                self._note("grow", num_blocks)
                self.counters["committed_pages"] += sum(growth.page_delta)
                return ranges + growth.ranges
            self.allocator.undo(growth)
            # Not all: take what there is, and halve if that was too hopeful.
            growable = self.growable_blocks()
            num_blocks = growable if growable < num_blocks else num_blocks // 2
        return ranges

    def _note(self, act: str, amount: int) -> None:
        if self.journal is not None:
            self.journal.append((act, amount))

    def note_shortage(self, num_blocks: int) -> None:
        """The engine was short of that many blocks; other members hear of it."""
        self.counters["shortages"] += 1
        self._demand.note(num_blocks)

    # -- a scheduling pass ----------------------------------------------------

    def begin_pass(self, running: Sequence[Request] = (), waiting: Sequence[Request] = ()) -> int:
        """Give back what others have a claim to, before this pass hands out any block.

        Args:
            running: the engine's running requests, the one to be preempted first at the end.
            waiting: its waiting requests; what they need is posted if memory is short.

        Returns:
            How many running requests, from the end, the engine must preempt now.
        """
        self._passes += 1
        self._demand.begin(waiting)
        self.accounts.touch()
        trimmed, with_cache = self._orders.begin(self._total_pages[0])
        self.contended = self.accounts.others_wait()
        # Memory for what runs now is not spare.
        self._keep_pages = self._pages_for_next(running) if self.contended or trimmed else 0
        if self.contended:
            # What finished requests left since the last pass must not be used again unseen.
            self._publish_spare()
        asked, asked_running = self._pages_asked()
        if asked_running:
            self._keep_pages = 0  # requests are to go anyway
        elif asked and not self.contended:
            self._keep_pages = self._pages_for_next(running)
        if asked and self._asked_since is None:
            self._asked_since = time.monotonic()
        preempt = 0
        self.withheld_blocks = 0
        if asked_running and self._passes - self._preempted_in >= _PREEMPTION_PAUSE:
            preempt = self._demand.last_requests(running, self._blocks_on(asked_running))
        if preempt:
            self.withheld_blocks = self._blocks_on(asked_running)
            self._preempted_in = self._passes
            self.counters["preemptions"] += preempt
            self.accounts.note_preemption(asked_running * self._page_bytes)
        self._owed_pages = max(asked + asked_running, trimmed)
        if self._owed_pages:
            self.counters["reclaim_steps"] += 1
            evict_for = max(asked, trimmed if with_cache else 0) + self._keep_pages
            if self.queue is not None and evict_for > self.allocator.parked_pages:
                self._note("empty", evict_for - self.allocator.parked_pages)
                self.queue.empty_pages(evict_for - self.allocator.parked_pages)
            self._decommit += self._give(self._owed_pages)
        return preempt

    def _pages_for_next(self, running: Sequence[Request]) -> int:
        """Parked pages the running requests may need in this pass."""
        beside = max(0, self.allocator.num_clean - self._blocks_on(self.allocator.parked_pages))
        needed = self._demand.next_blocks(running) - beside if running else 0
        return self._pages_for(max(0, needed))

    def _blocks_on(self, pages: int) -> int:
        """Blocks that fill so many pages."""
        return -(-pages * self._page_bytes // self._block_bytes)

    def _pages_for(self, blocks: int) -> int:
        """Parked pages that have so many blocks, wherever these lie on them."""
        # A block may be larger than a page, and a page need not be full of whole blocks.
        filled = -(-blocks * self._block_bytes // self._page_bytes)
        return max(filled, -(-blocks // self.blocks_per_page))

    def _give(self, pages: int) -> BlockRanges:
        """Decommit parked pages others asked for, as far as they can be spared."""
        if pages <= 0:
            return []
        spare = max(0, self.allocator.parked_pages - self._keep_pages)
        before = [self.allocator.committed_pages(g) for g in range(self._num_geometries)]
        ranges = self._shrink(min(pages, spare))
        gone = [n - self.allocator.committed_pages(g) for g, n in enumerate(before)]
        self._owed_pages = max(0, self._owed_pages - gone[0])
        for account in self.accounts:
            account.member.count("reclaimed_bytes", account.cost(gone))
        return ranges

    def take_ops(self, scheduled_tokens: int = 1, needed_blocks: int = 0) -> StepOps:
        """Close a scheduling pass: what its workers commit and decommit.

        Call exactly once per step that is sent, after all its blocks were taken, or else say how
        many will be.

        Args:
            scheduled_tokens: tokens the step runs; 0 if nothing could be scheduled.
            needed_blocks: clean blocks the step is still to take.
        """
        needed_pages = self._pages_for(needed_blocks)
        self._keep_pages = max(self._keep_pages, needed_pages)
        if self.queue is not None:
            self.queue.sweep()
            bound = self._cache_bound()
            if self.queue.num_cached > bound:
                self._note("keep", bound)
                self.queue.evict_down_to(bound)
        grew = bool(self._commit)
        # What preempted requests left, then what nobody has used for long.
        self._decommit += self._give(self._owed_pages)
        unused = max(self.allocator.parked_pages - self._parked_pages - needed_pages, 0)
        self._decommit += self._shrink(self._decay.observe(unused, time.monotonic()))
        decommit, self._decommit = self._decommit, []
        short = self._demand.end()
        ahead = self._commit_ahead() if grew and not decommit and not short else []
        commit, self._commit = self._commit, []
        self._publish(bool(decommit))
        if short and not scheduled_tokens and not decommit:
            self._bell.wait(_STARVED_PAUSE_MS)
        return StepOps(commit, ahead, decommit)

    def _commit_ahead(self) -> BlockRanges:
        missing = self._ahead_blocks - self.allocator.num_clean
        # Never take the last bytes for a guess: others may need them now.
        if missing <= 0 or self.growable_blocks() < 4 * missing:
            return []
        return self._grow(missing)

    def _pages_asked(self) -> tuple[int, int]:
        """Pages the ledgers ask for: unused ones, and those that running requests hold."""
        soft = hard = 0
        for account in self.accounts:
            asked, asked_running = account.member.ask()
            cost = max(account.page_cost[0], 1)
            soft, hard = max(soft, -(-asked // cost)), max(hard, -(-asked_running // cost))
        return soft, hard

    def _cache_bound(self) -> int:
        return self._orders.cache_bound(self.allocator.num_blocks)

    def _shrink(self, pages: int) -> BlockRanges:
        if pages <= 0:
            return []
        self._note("shrink", pages * self._page_bytes)
        shrunk = self.allocator.shrink(pages * self._page_bytes)
        self.counters["decommitted_pages"] -= sum(shrunk.page_delta)
        return shrunk.ranges

    # -- around the step ------------------------------------------------------

    def attend(self) -> bool:
        """What has to be looked after between steps; whether a step is wanted.

        Safe to call from another thread, as :meth:`wants_step` is.
        """
        self.refresh_usage()
        self._orders.acknowledge(self._num_cached() <= self._cache_bound(), self._settling)
        return self.wants_step()

    def wants_step(self) -> bool:
        """Whether a step with no tokens should be run to give memory back.

        Safe to call from another thread: it reads counters only.
        """
        if self._commit:
            return True
        if self._settling and not any(self._returning(a) for a in self.accounts):
            return True  # so that the engine's metrics tell what the workers have released
        unused = self.allocator.parked_pages
        if unused > self._parked_pages and self._decay.is_due(time.monotonic()):
            return True
        cached = self._num_cached()
        if cached > self._cache_bound() or self._orders.has_new():
            return True
        return bool(unused or cached) and self._pages_asked()[0] > 0

    def _returning(self, account: Account) -> int:
        """Bytes decommitted here that the workers have not released yet."""
        committed = [self.allocator.committed_pages(g) for g in range(self._num_geometries)]
        return max(0, account.member.info().leased - account.cost(committed))

    def refresh_usage(self, force: bool = False) -> None:
        """Publish the driver's totals to the ledgers, at most every 100 ms."""
        now = time.monotonic()
        if not self._usages or (now - self._usage_at < _USAGE_PERIOD_S and not force):
            return
        self._usage_at = now
        for account, usage in zip(self.accounts, self._usages, strict=True):
            if usage is not None:
                account.ledger.set_device_used(usage.used_bytes())

    def _publish_spare(self) -> None:
        spare = max(0, self.allocator.parked_pages - self._keep_pages)
        cached = self._num_cached()
        for account in self.accounts:
            account.member.set_parked(spare * account.page_cost[0])
            account.member.set_cached(cached * account.block_cost)

    def _num_cached(self) -> int:
        return self.queue.num_cached if self.queue is not None else 0

    def _publish(self, gave: bool) -> None:
        self._publish_spare()
        settling = gave
        for account in self.accounts:
            returning = self._returning(account)
            settling = settling or returning > 0
            account.member.set_returning(returning)
        # At once, and before the trims count as done: another thread acknowledges them.
        self._settling = settling
        self._orders.finish()
        self.accounts.count(self.counters)
        if self._asked_since is not None and not settling:
            self.accounts.time("reclaim", time.monotonic() - self._asked_since)
            self._asked_since = None

    def stats(self) -> dict[str, float | list[float]]:
        """For the engine's metrics: bytes over all ledgers, counts since start, and the times
        since the last call that :data:`~kvcached_core.metrics.HISTOGRAMS` names.
        """
        totals = dict.fromkeys(
            (
                "capacity",
                "available",
                "leased",
                "committed",
                "parked",
                "cached",
                "guarantee",
                "limit",
                "demand",
                "asked",
            ),
            0.0,
        )
        times: dict[str, float | list[float]] = {name: [] for name in HISTOGRAMS}
        for index, account in enumerate(self.accounts):
            info = account.member.info()
            totals["capacity"] += account.ledger.capacity
            totals["available"] += account.member.claimable()
            totals["limit"] += account.ledger.capacity if info.limit is None else info.limit
            for name in ("leased", "committed", "parked", "cached", "guarantee", "demand"):
                totals[name] += getattr(info, name)
            totals["asked"] += info.asked + info.asked_running
            for kind, histogram in info.histograms.items() if index == 0 else ():
                times[f"{kind}_seconds"] = self._feed.new_values(kind, histogram.counts)
        stats: dict[str, float | list[float]] = {
            f"{name}_bytes": value for name, value in totals.items()
        }
        stats.update({name: float(value) for name, value in self.counters.items()})
        stats["waiting_requests"] = float(self._demand.waiting)
        return stats | times

    def pause(self, timeout_ms: int) -> None:
        """Return at the next news of the ledger, or after that long."""
        self._bell.wait(timeout_ms)

    def watch(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, from another thread, whenever :meth:`wants_step` is true."""
        self._watcher = Watcher(self.attend, wake, self.accounts.bell().wait)

    def close(self) -> None:
        """Leave the ledgers; the bytes return once every worker has left as well."""
        if self._watcher is not None:
            self._watcher.stop()
        self.accounts.close()
