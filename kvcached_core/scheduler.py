# SPDX-License-Identifier: Apache-2.0
"""The scheduler half: what is promised, which blocks are backed, what workers do.

The engine's scheduler asks for blocks; this half leases the bytes first, then
marks the blocks committed, and ships the block ids with the step the engine
sends anyway.  It never talks to a driver, so it needs no GPU context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ._core import BlockAllocator
from .accounts import Account, Accounts
from .acts import Acts
from .demand import Demand, Request
from .forecast import Forecast
from .free_queue import BlockList, ElasticFreeQueue
from .giving import Giving
from .holding import Holding
from .orders import Orders
from .outlook import Generating, Outlook
from .plan import ArenaShape, StepOps
from .pool import CachedBlocks, Pool, geometry_of
from .pools import Pools
from .rivals import Rivals
from .stats import Stats
from .told import Told
from .usage import DeviceUsage
from .watcher import Watcher

if TYPE_CHECKING:
    from .sleep.engine_sleep import EngineSleep

__all__ = ["CachedBlocks", "ElasticScheduler", "Pool", "geometry_of"]

_USAGE_PERIOD_S = 0.1
_LOOK_S = 0.1
"""While nobody wants anything, how often a pass looks at all there is to see."""
_TELL_S = 0.1
"""How often metrics are told while requests run."""
_NOTHING = StepOps([], [], [])
_STARVED_PAUSE_MS = 2
"""How long an engine that could run nothing for want of memory waits for some."""
_APART_PART = 3
"""Requests have pages of their own while a third of what an engine holds could be had besides."""
_PREEMPTION_PAUSE = 3
"""Passes from one preemption for others to the next: its blocks may come back late."""


class ElasticScheduler:
    """Capacity of one engine; single-threaded but for :meth:`attend` and :meth:`wants_step`.

    A scheduling pass is :meth:`begin_pass`, the engine's own work, :meth:`take_ops`.

    Args:
        num_blocks: virtual blocks, the null block (id 0) among them.
        shapes: the distinct arena shapes of the ranks, largest block first.
        accounts: this engine's memberships.
        parked_bytes: what an idle engine keeps mapped, in bytes of the first shape; of every pool
            an equal part.
        ahead_bytes: what a growing engine keeps committed ahead at least, likewise; with 0 it keeps
            nothing.
        decay_s: how long pages beyond ``parked_bytes`` stay unused first.
        usages: driver totals for accounts that sit on a GPU, or None.
        holding: blocks a request holds, to size demand by.
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
        holding: Holding | None = None,
        start_wait_s: float = 0.0,
    ) -> None:
        self.accounts = Accounts(accounts)
        self.pools = Pools(self.accounts)
        """The first is the one that callers mean who name none."""
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
        self._parked_bytes = parked_bytes
        self._ahead_bytes = ahead_bytes
        self._decay_s = decay_s
        self._start_wait_s = start_wait_s
        self._usages = tuple(usages)
        self._usage_at = 0.0
        self._asked_since: float | None = None
        self._bell = self.accounts.bell()
        self._passes = 0
        self._dry_in = -1
        self._preempted_in = -_PREEMPTION_PAUSE
        self.contended = False
        """Whether others wait for memory in this pass."""
        self.apart = False
        """Whether memory is so plentiful in this pass that no two requests share a page: then all
        pages of a request are empty when it ends, however long its neighbours go on."""
        self._may_keep_apart = False
        self._quiet = False
        self._quiet_until = -math.inf
        self._plain = False
        self._now = 0.0
        self._counted = (0, 0, 0, 0)
        self._growable = 0
        self._limits_cache = False
        self._attended = 0
        self._busy = False
        self._told_at = -math.inf
        self._watcher: Watcher | None = None
        self._running: Sequence[Request] = ()
        self._waiting: Sequence[Request] = ()
        self._forecasts: list[Forecast] = []
        self.sleep: EngineSleep | None = None
        """Keeps the account while the engine's weights go and come."""
        self._demand = Demand(self.accounts, self.pools)
        self._told = Told(self.accounts, self.pools)
        self._orders = Orders(self.accounts)
        self.acts = Acts(self.accounts, self.pools, self.counters)
        self.giving = Giving(self.accounts, self.pools, self.acts)
        self.rivals = Rivals(self.accounts, self.giving.give_all)
        self._stats = Stats(self.accounts)
        self.refresh_usage(force=True)
        self.add_pool(
            num_blocks,
            shapes,
            accounts,
            holding or Holding(),
        )
        self._outlook = Outlook(self.pools[0])

    def add_pool(
        self,
        num_blocks: int,
        shapes: Sequence[ArenaShape],
        accounts: Sequence[Account],
        holding: Holding,
    ) -> Pool:
        """Have further blocks, of another size, under the same membership.

        Args:
            num_blocks: as for the first pool, and so are the shapes.
            shapes: likewise.
            accounts: the engine's memberships in the same order, priced for these blocks.
            holding: blocks a request holds of them.

        Raises:
            MemoryError: not even its null block can be leased.
        """
        pool = Pool(
            num_blocks,
            shapes,
            accounts,
            holding,
            decay_s=self._decay_s,
        )
        if not pool.accounts.wait_for(pool.committed_pages(), self._start_wait_s):
            raise MemoryError("not even the null block's page can be leased")
        self.pools.append(pool)
        self._forecasts.append(Forecast(pool))
        for account, pinned in zip(self.accounts, self.pools.committed(), strict=True):
            account.member.set_pinned(pinned)
        return pool

    # -- the first pool, for engines that have no other ------------------------

    @property
    def allocator(self) -> BlockAllocator:
        return self.pools[0].allocator

    @property
    def queue(self) -> CachedBlocks | None:
        return self.pools[0].cache

    @queue.setter
    def queue(self, cache: CachedBlocks | None) -> None:
        self.pools[0].cache = cache

    def free_queue(
        self, blocks: Sequence[Any], cached: BlockList, evict: Callable[[Any], object]
    ) -> ElasticFreeQueue:
        """Make the engine's free queue; called once, by its block pool."""
        queue = ElasticFreeQueue(self, blocks, cached, evict)
        self.queue = queue
        self._may_keep_apart = self.pools[0].blocks_per_page > 1
        return queue

    # -- growing --------------------------------------------------------------

    def growable_blocks(
        self, pool: int = 0, beside: Sequence[int] = (), urgent: bool = False
    ) -> int:
        """Uncommitted blocks of a pool the ledgers could back now.

        Args:
            pool: index.
            beside: blocks of every pool that are wanted as well; this one's do not count.
            urgent: whether running requests are preempted without them.
        """
        # What was given back in this pass must not come back before its workers heard of it.
        if not self.pools[pool].allocator.num_uncommitted or self.gives:
            return 0
        others = [0 if index == pool else blocks for index, blocks in enumerate(beside)]
        return self.pools[pool].affordable_blocks(self._demand.costs(others), urgent)

    def blocks_to_come(self, spare: int) -> int:
        """Blocks of the first pool that running requests will take, so that no new one gets them;
        none where there is no ledger, or the new request is within what the engine is guaranteed.

        Args:
            spare: blocks that are ready beyond what the new request wants.
        """
        blocks = self._outlook.blocks(spare + self._growable) if len(self.accounts) else 0
        if blocks and self.accounts.within_guarantee(self._demand.costs([-spare])):
            return 0
        return blocks

    @property
    def growable_lately(self) -> int:
        """The same of the first pool, from a few passes ago where nobody wants anything."""
        quiet = time.monotonic() < self._quiet_until
        return self._growable if quiet else self.growable_blocks()

    @property
    def quiet(self) -> bool:
        """Whether nobody wanted anything when this pass began, nor in the last one."""
        return self._quiet and self._plain

    @property
    def gives(self) -> bool:
        """Whether this pass gives memory back, and so can take none."""
        return self.pools.gives

    def grow(self, num_blocks: int, pool: int = 0, urgent: bool = False) -> int:
        """Commit up to ``num_blocks`` more blocks for this step; return how many came."""
        if self.gives:
            return 0
        self.refresh_usage()
        came = self.acts.grow(pool, num_blocks, urgent)
        self._growable = max(0, self._growable - came) if came == num_blocks else 0
        if came < num_blocks:
            self._dry_in = self._passes
        if came:
            self._demand.met([0] * pool + [came])
        return came

    @property
    def dry(self) -> bool:
        """Whether growing came short in this pass: what is cached will do just as well."""
        return self._dry_in == self._passes

    def grow_together(self, num_blocks: Sequence[int], urgent: bool = False) -> bool:
        """Commit so many more blocks of every pool for this step, all of them or none: what one
        pool takes may cost the engine its turn, and with it what the others lack.
        """
        if self.gives:
            return False
        self.refresh_usage()
        came = self.acts.grow_together(num_blocks, urgent)
        if came:
            self._demand.met(num_blocks)
        return came

    def grow_apart(self, num_blocks: int, beside: int) -> None:
        """Have so many blocks on the page of the block ``beside`` and on pages of no request."""
        pool = self.pools[0]
        room = pool.apart_blocks + (pool.allocator.clean_beside(beside) if beside else 0)
        if num_blocks > room:
            self.grow(num_blocks - room)

    def note_shortage(self, *num_blocks: int) -> None:
        """The engine was short of that many blocks of every pool; other members hear of it."""
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
        self._running, self._waiting = running, waiting
        self.rivals.begin(running)
        self._outlook.begin(cast("Sequence[Generating]", running))
        self._demand.begin(waiting)
        self.accounts.touch()
        self._now = now = time.monotonic()
        self._quiet = now < self._quiet_until and self.accounts.calm()
        if self._quiet:
            for pool in self.pools:
                pool.keep_pages = 0
            return 0
        unit = self.pools.unit
        trimmed, with_cache = self._orders.begin(
            unit.page_bytes, unit.accounts, self.pools.held_bytes()
        )
        self.contended = self.accounts.others_wait()
        self.rivals.look(now, self.contended)
        # Memory for what runs now is not spare.
        self.pools.keep_for_next(running if self.contended or trimmed else ())
        if self.contended:
            # What finished requests left since the last pass must not be used again unseen.
            self._told.spare()
        asked, asked_running = self._bytes_asked()
        if asked_running:
            self.pools.keep_for_next(())  # requests are to go anyway
        elif asked and not self.contended:
            self.pools.keep_for_next(running)
        if asked and self._asked_since is None:
            self._asked_since = now
        preempt = 0
        if asked_running and self._passes - self._preempted_in >= _PREEMPTION_PAUSE:
            preempt = self._demand.last_requests(running, asked_running)
        self.pools.withhold(asked_running if preempt else 0)
        if preempt:
            self._preempted_in = self._passes
            self.counters["preemptions"] += preempt
            self.accounts.note_preemption(asked_running)
        owed = max(asked + asked_running, trimmed)
        self.counters["reclaim_steps"] += owed > 0
        self.giving.owe(owed, of_caches=max(asked, trimmed if with_cache else 0))
        self._growable = self.growable_blocks()
        self.apart = (
            self._may_keep_apart
            and not self.contended
            and _APART_PART * self._growable >= self.allocator.num_live
        )
        self._limits_cache = any(limit is not None for limit in self._orders.cache_limits())
        # Several pools have to be weighed against each other in every pass.
        noisy = owed or self.contended or len(self.pools) > 1
        self._quiet_until = -math.inf if noisy else now + _LOOK_S
        return preempt

    def give_all(self) -> StepOps:
        """A pass that gives back all that no request uses, and takes nothing: for an idle engine.

        Returns:
            What its workers decommit.
        """
        self.begin_pass()
        self.giving.give_all()
        return self.take_ops(0)

    def take_ops(
        self,
        scheduled_tokens: int = 1,
        needed_blocks: int | Sequence[int] = 0,
        still: bool | None = None,
    ) -> StepOps:
        """Close a scheduling pass: what its workers commit and decommit.

        Call exactly once per step that is sent, after all its blocks were taken, or else say how
        many will be.

        Args:
            scheduled_tokens: tokens the step runs; 0 if nothing could be scheduled.
            needed_blocks: clean blocks the step is still to take, of every pool.
            still: whether nothing runs for want of memory; None: by the tokens and what was short.
        """
        if still is None:
            still = not scheduled_tokens and self._demand.short
        turned_away = self.rivals.end(bool(still))
        if self.quiet and scheduled_tokens and isinstance(needed_blocks, int):
            quiet = self._end_quietly(needed_blocks)
            if quiet is not None:
                return quiet
        needed = [needed_blocks] if isinstance(needed_blocks, int) else needed_blocks
        needed_pages = [p.pages_for(n) for p, n in zip(self.pools, needed, strict=True)]
        for pool, pages in zip(self.pools, needed_pages, strict=True):
            pool.keep_pages = max(pool.keep_pages, pages)
            if pool.cache is not None:
                pool.cache.sweep()
        for index in range(len(self.pools)) if self._limits_cache else ():
            self.acts.keep(index, self._cache_bound(index))
        # What preempted requests left, then what nobody has used for long.
        self.giving.settle()
        now = time.monotonic()
        for index, (pool, pages) in enumerate(zip(self.pools, needed_pages, strict=True)):
            unused = pool.allocator.parked_pages - self._parked_pages(pool) - pages
            self.acts.shrink(index, pool.decay.observe(max(unused, 0), now))
        gave = self.gives
        if turned_away:
            self._demand.withdraw()
        short = self._demand.end()
        ops: list[StepOps] = []
        for index, pool in enumerate(self.pools):
            commit, pool.commit = pool.commit, []
            self._forecasts[index].observe(self.apart)
            if not gave and not short:
                self._commit_ahead(index, needed[index], mapping=bool(commit))
            ahead, pool.commit = pool.commit, []
            ops.append(StepOps(commit, ahead, pool.decommit))
            pool.decommit = []
        self._told.all(gave)
        # After that: another thread acknowledges trims that count as done.
        self._orders.finish()
        self.accounts.count(self.counters)
        if self._asked_since is not None and not self._told.settling:
            self.accounts.time("reclaim", now - self._asked_since)
            self._asked_since = None
        self._busy = scheduled_tokens > 0
        self._plain = (
            not self._limits_cache and not self._told.settling and self._asked_since is None
        )
        if (short or turned_away) and not scheduled_tokens and not gave:
            self._bell.wait(_STARVED_PAUSE_MS)
        return replace(ops[0], others=tuple(ops[1:])) if len(ops) > 1 else ops[0]

    def _end_quietly(self, needed: int) -> StepOps | None:
        """The end of a pass in which nobody wants anything: only what its own blocks bring about.

        None where there is more to do, after all.
        """
        pool = self.pools[0]
        pages = pool.pages_for(needed) if needed else 0
        if not self._demand.idle or pool.decommit or pool.decay.is_due(self._now):
            return None
        self._busy = True
        # What becomes cached may have been live all the same.
        counted = (pool.allocator.num_live, pool.allocator.num_clean, pool.num_cached, needed)
        if counted == self._counted and not pool.commit:
            return _NOTHING
        self._counted = counted
        pool.keep_pages = pages
        unused = pool.allocator.parked_pages - self._parked_pages(pool) - pages
        pool.decay.dip(max(0, unused))
        commit, pool.commit = pool.commit, []
        self._forecasts[0].observe(self.apart)
        self._commit_ahead(0, needed, mapping=bool(commit))
        ahead, pool.commit = pool.commit, []
        self._told.spare()
        return StepOps(commit, ahead, [])

    def _parked_pages(self, pool: Pool) -> int:
        return pool.pages_in(self._parked_bytes // len(self.pools))

    def _commit_ahead(self, index: int, needed: int, mapping: bool) -> None:
        """Commit what later passes will take, but for the ``needed`` blocks of this one."""
        if self.dry:
            return
        pool = self.pools[index]
        least = pool.blocks_in(self._ahead_bytes // len(self.pools))
        clean = pool.apart_blocks if self.apart else pool.allocator.num_clean
        spare = max(0, clean - needed)
        wanted = self._forecasts[index].wanted(least, spare, mapping, self._running, self._waiting)
        for missing in (wanted - spare, least - spare):
            # Never take the last bytes for a guess: others may need them now.
            if wanted and 0 < 4 * missing <= self.growable_blocks(index):
                self.grow(missing, index)
                break

    def _bytes_asked(self) -> tuple[int, int]:
        """What the ledgers ask for: unused memory, and some that running requests hold."""
        unit = self.pools.unit
        soft = hard = 0
        for account, own in zip(unit.accounts, self.accounts, strict=True):
            asked, asked_running = own.member.ask()
            cost = max(account.page_cost[0], 1)
            soft, hard = max(soft, -(-asked // cost)), max(hard, -(-asked_running // cost))
        return soft * unit.page_bytes, hard * unit.page_bytes

    def _cache_bound(self, index: int) -> int:
        """Blocks of a pool that may stay cached."""
        pool = self.pools[index]
        bound = pool.allocator.num_blocks
        for limit, held in zip(self._orders.cache_limits(), self.pools.cached(), strict=True):
            if limit is not None and held > limit:
                bound = min(bound, pool.num_cached * limit // held)
        return bound

    # -- around the step ------------------------------------------------------

    def attend(self) -> bool:
        """What has to be looked after between steps; whether a step is wanted.

        Safe to call from another thread, as :meth:`wants_step` is.
        """
        self.refresh_usage()
        before, self._attended = self._attended, self._passes
        quiet = self._quiet and not self._limits_cache
        if before != self._attended and quiet and self.accounts.calm():
            return False  # it runs: what is to be done its passes do
        self._orders.acknowledge(self._caches_fit(), self._told.settling)
        return self.wants_step()

    def wants_step(self) -> bool:
        """Whether a step with no tokens should be run to give memory back.

        Safe to call from another thread: it reads counters only.
        """
        if any(pool.commit for pool in self.pools):
            return True
        if self._told.settling and not any(self.pools.all_returning()):
            return True  # so that the engine's metrics tell what the workers have released
        now = time.monotonic()
        for pool in self.pools:
            unused = pool.allocator.parked_pages
            if unused > self._parked_pages(pool) and pool.decay.is_due(now):
                return True
        if not self._caches_fit() or self._orders.has_new():
            return True
        spare = any(pool.allocator.parked_pages or pool.num_cached for pool in self.pools)
        return spare and self._bytes_asked()[0] > 0

    def _caches_fit(self) -> bool:
        limits = zip(self._orders.cache_limits(), self.pools.cached(), strict=True)
        return all(limit is None or held <= limit for limit, held in limits)

    def refresh_usage(self, force: bool = False) -> None:
        """Publish the driver's totals to the ledgers, at most every 100 ms."""
        now = time.monotonic()
        if not self._usages or (now - self._usage_at < _USAGE_PERIOD_S and not force):
            return
        self._usage_at = now
        for account, usage in zip(self.accounts, self._usages, strict=True):
            if usage is not None:
                usage.publish(account.ledger)

    def stats(self) -> dict[str, float | list[float]] | None:
        """For the engine's metrics: bytes over all ledgers, counts since start, and the times
        since the last call that :data:`~kvcached_core.metrics.HISTOGRAMS` names. None where it was
        asked for a moment ago and requests run.
        """
        now = time.monotonic()
        if self._busy and now - self._told_at < _TELL_S:
            return None
        self._told_at = now
        counted = {name: float(value) for name, value in self.counters.items()}
        counted["waiting_requests"] = float(self._demand.waiting)
        told: dict[str, float | list[float]] = self._stats.read()
        told.update(counted)
        return told

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
