# SPDX-License-Identifier: Apache-2.0
"""Passes decided by one rank and repeated by all, for engines whose every rank schedules.

Only the first rank talks to the ledgers and looks at clocks.  What it did to its allocator and its
cache travels to the other ranks with what the ranks share anyway, and is done there again; as the
allocator and the cache are deterministic, all ranks stay equal without asking each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._core import BlockAllocator
from .demand import Request
from .plan import BlockRanges, StepOps
from .scheduler import CachedBlocks, ElasticScheduler

_REACHABLE_STEPS = 64
"""Parts of the virtual range in which memory that could be had is told: it need not be exact."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine runs and wants to run in its next pass."""

    running: Sequence[Request]
    """The request to be preempted first at the end."""
    waiting: Sequence[Request]
    running_blocks: int
    """Blocks the running requests take in the pass."""
    needed_blocks: int
    """Those, and what waiting requests may take besides."""
    wanted_blocks: int
    """Blocks that must be free, or there to be had, before the first waiting request is let in."""
    first_blocks: int = 0
    """Blocks its prompt takes, in however many passes."""


@dataclass(frozen=True, slots=True)
class PassOrder:
    """What every rank does at the start of a pass."""

    acts: tuple[tuple[str, int], ...] = ()
    """Done to the allocator and the cache, in this order; see :meth:`Replica.repeat`."""
    reachable_blocks: int = 0
    """Blocks that could be had beyond the clean ones, for admission."""
    withheld_blocks: int = 0
    """Clean blocks the engine must not use, but free more of: others have a claim to them."""


class Replica:
    """A rank's copy of the allocator and its cache.

    Args:
        allocator: equal to the first rank's.
        cache: likewise; set once the engine has one.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self.allocator = allocator
        self.cache: CachedBlocks | None = None

    def repeat(self, order: PassOrder) -> StepOps:
        """Do what the first rank did; return what this rank's arena has to do."""
        commit: BlockRanges = []
        decommit: BlockRanges = []
        for act, amount in order.acts:
            if act == "grow":
                commit += self.allocator.grow(amount).ranges
            elif act == "shrink":
                decommit += self.allocator.shrink(amount).ranges
            elif self.cache is not None:
                evict = self.cache.empty_pages if act == "empty" else self.cache.evict_down_to
                evict(amount)
        return StepOps(commit, [], decommit)


class Leader:
    """The first rank's part: plans a pass with the scheduler half.

    Args:
        scheduler: of this engine.
        ranks: how many ranks there are, this one among them.
    """

    def __init__(self, scheduler: ElasticScheduler, ranks: int) -> None:
        self.scheduler = scheduler
        self._journal: list[tuple[str, int]] | None = [] if ranks > 1 else None
        self._step = max(1, scheduler.allocator.num_blocks // _REACHABLE_STEPS) if ranks > 1 else 1

    def plan(self, load: Load) -> tuple[PassOrder, StepOps]:
        """Begin and end a pass: all its growing is done before the engine schedules.

        Returns:
            What the ranks repeat, and what this rank's arena has to do.
        """
        scheduler = self.scheduler
        scheduler.journal = self._journal
        scheduler.begin_pass(load.running, load.waiting)
        cached = scheduler.queue.num_cached if scheduler.queue is not None else 0
        needed, promised = self._to_hold(load, cached)
        if needed > scheduler.allocator.num_clean:
            scheduler.grow(needed - scheduler.allocator.num_clean)
        reachable = scheduler.growable_blocks()
        missing = load.needed_blocks - scheduler.allocator.num_clean
        lack = 0 if promised else load.wanted_blocks - scheduler.allocator.num_clean - reachable
        if max(missing, lack) > cached and not scheduler.gives:
            # What is free but not leased counts as missing too: the plan takes it off again.
            scheduler.note_shortage(max(missing, lack) - cached + reachable)
        # What is too little for those who wait may go to others meanwhile.
        ops = scheduler.take_ops(1, load.running_blocks if missing > cached else needed)
        acts = tuple(self._journal or ())
        if self._journal is not None:
            self._journal.clear()
        reachable = self._reachable(load.wanted_blocks, promised)
        # The engine takes blocks after this, and may take any that are clean: none is for later.
        ops = StepOps(ops.commit + ops.commit_ahead, [], ops.decommit)
        return PassOrder(acts, reachable, scheduler.withheld_blocks), ops

    def _to_hold(self, load: Load, cached: int) -> tuple[int, bool]:
        """Clean blocks to have, and whether the first waiting request is to be let in now."""
        scheduler = self.scheduler
        if not scheduler.contended or not load.waiting:
            return load.needed_blocks, False
        # Who holds a part is outranked by who holds none, and they would give it to each other in
        # turns for ever. So nothing is taken for those who wait, unless the first can be let in;
        # then all of its prompt is, before that changes what else could be had.
        lack = load.wanted_blocks - scheduler.allocator.num_clean - cached
        if lack > scheduler.growable_blocks():
            return load.running_blocks, False
        return max(load.needed_blocks, load.first_blocks), True

    def _reachable(self, wanted_blocks: int, promised: bool) -> int:
        """Rounded down, as it is told anew when it changes, but not below what those who wait lack:
        nobody would grow or ask for what is there, and they would wait for ever.
        """
        scheduler = self.scheduler
        cached = scheduler.queue.num_cached if scheduler.queue is not None else 0
        lack = wanted_blocks - scheduler.allocator.num_clean - cached
        exact = scheduler.growable_blocks()
        return max(exact // self._step * self._step, lack if promised else min(lack, exact))
