# SPDX-License-Identifier: Apache-2.0
"""Passes decided by one rank and repeated by all, for engines whose every rank schedules.

Only the first rank talks to the ledgers and looks at clocks.  What it did to its allocator and its
cache travels to the other ranks with what the ranks share anyway, and is done there again; as the
allocator and the cache are deterministic, all ranks stay equal without asking each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ._core import BlockAllocator
from .acts import Act
from .demand import Request
from .plan import StepOps
from .pool import CachedBlocks
from .scheduler import ElasticScheduler

_REACHABLE_STEPS = 64
"""Parts of the virtual range in which memory that could be had is told: it need not be exact."""


@dataclass(frozen=True, slots=True)
class Need:
    """Blocks of one pool that an engine takes in its next pass."""

    running_blocks: int
    """Blocks the running requests take in the pass."""
    needed_blocks: int
    """Those, and what waiting requests may take besides."""
    wanted_blocks: int
    """Blocks that must be free, or there to be had, before the first waiting request is let in."""
    first_blocks: int = 0
    """Blocks its prompt takes, in however many passes."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine runs and wants to run in its next pass."""

    running: Sequence[Request]
    """The request to be preempted first at the end."""
    waiting: Sequence[Request]
    needs: tuple[Need, ...]
    """Of every pool."""
    first_needs: Callable[[], tuple[Need, ...]] | None = None
    """The same if only the first of those that wait were there; None where that is nothing else."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a pass may count on in one pool."""

    reachable_blocks: int = 0
    """Blocks that could be had beyond the clean ones, for admission."""
    withheld_blocks: int = 0
    """Clean blocks the engine must not use, but free more of: others have a claim to them."""


@dataclass(frozen=True, slots=True)
class PassOrder:
    """What every rank does at the start of a pass."""

    acts: tuple[Act, ...] = ()
    """Done to the allocators and the caches, in this order; see :meth:`Replica.repeat`."""
    rooms: tuple[Room, ...] = ()
    """Of every pool."""

    def room(self, pool: int = 0) -> Room:
        return self.rooms[pool] if pool < len(self.rooms) else Room()


@dataclass(slots=True)
class Copy:
    """One pool on a rank that repeats."""

    allocator: BlockAllocator
    """Equal to the first rank's."""
    cache: CachedBlocks | None = None
    """Likewise; set once the engine has one."""


class Replica:
    """A rank's copies of the allocators and their caches."""

    def __init__(self, *allocators: BlockAllocator) -> None:
        self.pools = [Copy(allocator) for allocator in allocators]

    def repeat(self, order: PassOrder) -> StepOps:
        """Do what the first rank did; return what this rank's arenas have to do."""
        ops = [StepOps([], [], []) for _ in self.pools]
        for act, amount, index in order.acts:
            pool = self.pools[index]
            if act == "grow":
                ops[index].commit.extend(pool.allocator.grow(amount).ranges)
            elif act == "shrink":
                ops[index].decommit.extend(pool.allocator.shrink(amount).ranges)
            elif pool.cache is not None:
                evict = pool.cache.empty_pages if act == "empty" else pool.cache.evict_down_to
                evict(amount)
        return replace(ops[0], others=tuple(ops[1:]))


class Leader:
    """The first rank's part: plans a pass with the scheduler half.

    Args:
        scheduler: of this engine.
        ranks: how many ranks there are, this one among them.
    """

    def __init__(self, scheduler: ElasticScheduler, ranks: int) -> None:
        self.scheduler = scheduler
        self._journal: list[Act] | None = [] if ranks > 1 else None
        self._told: tuple[Room, ...] = ()

    def plan(self, load: Load) -> tuple[PassOrder, StepOps]:
        """Begin and end a pass: all its growing is done before the engine schedules.

        Returns:
            What the ranks repeat, and what this rank's arenas have to do.
        """
        scheduler, pools = self.scheduler, self.scheduler.pools
        scheduler.acts.journal = self._journal
        scheduler.begin_pass(load.running, load.waiting)
        if self._has_all(load):
            # Whoever waits for nothing asks for no room, so it may be what it was.
            ops = scheduler.take_ops(1, load.needs[0].needed_blocks)
            return PassOrder(self._acts(), self._told), _at_once(ops)
        everybody = load.needs
        weighed = scheduler.contended or len(pools) > 1
        if weighed and load.first_needs is not None and not self._could_have(everybody):
            # Else two engines wait for ever for what all of their requests need, and leave memory
            # for some alone; or one pool takes for all what another lacks for the first, and gives
            # it up again for that, in turns for ever.
            load = replace(load, needs=load.first_needs())
        cached = [pool.num_cached for pool in pools]
        needed, promised = self._to_hold(load)
        running = [need.running_blocks for need in load.needs]
        if weighed:
            # If there is not enough for all, no pool may take what another needs to go on, and
            # what runs here goes before what waits elsewhere.
            self._grow(running, urgent=True)
        if not self._grow(needed, whole=promised):
            needed, promised = running, False
        still = scheduler.contended and bool(load.waiting) and not load.running and not promised
        if still:
            # What it has is of use to others only, and if they are as short as it is, nobody would
            # ask for it.
            scheduler.giving.let_go(running)
        clean = [pool.allocator.num_clean for pool in pools]
        missing = [need.needed_blocks - n for need, n in zip(load.needs, clean, strict=True)]
        tight = any(m > c for m, c in zip(missing, cached, strict=True))
        short = self._short(load.needs, promised)
        # What is too little for those who wait may go to others meanwhile.
        hold = running if tight else needed
        gives = scheduler.gives or (
            max(short) > 0 and len(pools) > 1 and scheduler.giving.yield_to(short, hold)
        )
        if not gives:
            if load.needs is not everybody and max(short) <= 0:
                short = self._short(everybody, promised)  # the first has all it lacks
            self._post(short)
        ops = scheduler.take_ops(1, hold, still)
        acts = self._acts()
        self._told = self._rooms(load, promised)
        return PassOrder(acts, self._told), _at_once(ops)

    def _grow(self, targets: Sequence[int], whole: bool = False, urgent: bool = False) -> bool:
        """Have so many clean blocks of every pool, or as many as there are; if ``whole``, all of
        them or none more, and whether they are there. Requests are preempted without what is
        ``urgent``.
        """
        scheduler, pools = self.scheduler, self.scheduler.pools
        clean = [pool.allocator.num_clean for pool in pools]
        more = [max(0, target - n) for target, n in zip(targets, clean, strict=True)]
        several = sum(blocks > 0 for blocks in more) > 1
        if several and (scheduler.grow_together(more, urgent) or whole):
            return all(p.allocator.num_clean >= n for p, n in zip(pools, targets, strict=True))
        for index, blocks in enumerate(more):
            if blocks:
                scheduler.grow(blocks, index, urgent)
        return True

    def _acts(self) -> tuple[Act, ...]:
        acts = tuple(self._journal or ())
        if self._journal is not None:
            self._journal.clear()
        return acts

    def _has_all(self, load: Load) -> bool:
        """Whether nobody wants anything, and what runs finds its blocks without a look at what
        could be had.
        """
        if not self.scheduler.quiet or load.waiting:
            return False
        need = load.needs[0]
        return max(need.needed_blocks, need.wanted_blocks) <= self.scheduler.allocator.num_clean

    def _could_have(self, needs: Sequence[Need]) -> bool:
        """Whether every pool finds what is wanted of it beside what is wanted of the others."""
        lack = self._lack(needs)
        return all(x <= g for x, g in zip(lack, self._growable(lack), strict=True))

    def _short(self, needs: Sequence[Need], promised: bool) -> list[int]:
        """Blocks every pool lacks, and neither caches itself nor could lease."""
        pools = self.scheduler.pools
        clean = [pool.allocator.num_clean for pool in pools]
        wanted = [need.wanted_blocks - n for need, n in zip(needs, clean, strict=True)]
        growable = self._growable(wanted)
        short = []
        for pool, need, n, w, g in zip(pools, needs, clean, wanted, growable, strict=True):
            lack = 0 if promised else w - g
            short.append(max(need.needed_blocks - n, lack) - pool.num_cached)
        return short

    def _post(self, short: list[int]) -> None:
        """Let others know of what pools are short of."""
        first = next((index for index, blocks in enumerate(short) if blocks > 0), None)
        if first is not None:
            # What is free but not leased counts as missing too: the plan takes it off again.
            short[first] += self.scheduler.growable_blocks(first)
            self.scheduler.note_shortage(*(max(0, blocks) for blocks in short))

    def _growable(self, wanted: Sequence[int]) -> list[int]:
        """Blocks of every pool that could be had beside what is wanted of the others."""
        return [
            self.scheduler.growable_blocks(index, wanted)
            for index in range(len(self.scheduler.pools))
        ]

    def _to_hold(self, load: Load) -> tuple[list[int], bool]:
        """Clean blocks to have, and whether the first waiting request is to be let in now."""
        scheduler = self.scheduler
        if not scheduler.contended or not load.waiting:
            return [need.needed_blocks for need in load.needs], False
        # Who holds a part is outranked by who holds none, and they would give it to each other in
        # turns for ever. So nothing is taken for those who wait, unless the first can be let in;
        # then all of its prompt is, before that changes what else could be had.
        if not self._could_have(load.needs):
            return [need.running_blocks for need in load.needs], False
        return [max(need.needed_blocks, need.first_blocks) for need in load.needs], True

    def _lack(self, needs: Sequence[Need]) -> list[int]:
        """Blocks the first waiting request wants that are neither clean nor cached."""
        return [
            need.wanted_blocks - pool.allocator.num_clean - pool.num_cached
            for need, pool in zip(needs, self.scheduler.pools, strict=True)
        ]

    def _rooms(self, load: Load, promised: bool) -> tuple[Room, ...]:
        """Rounded down, as it is told anew when it changes, but not below what those who wait lack:
        nobody would grow or ask for what is there, and they would wait for ever.
        """
        rooms = []
        lacks = self._lack(load.needs)
        exact = self._growable(lacks)
        for pool, lack, growable in zip(self.scheduler.pools, lacks, exact, strict=True):
            steps = 1 if self._journal is None else pool.allocator.num_blocks // _REACHABLE_STEPS
            rounded = growable // max(1, steps) * max(1, steps)
            reachable = max(rounded, lack if promised else min(lack, growable))
            rooms.append(Room(reachable, pool.withheld_blocks))
        return tuple(rooms)


def _at_once(ops: StepOps) -> StepOps:
    """The engine takes blocks after this, and may take any that are clean: none is for later."""
    if not (ops.commit_ahead or ops.others):
        return ops
    others = tuple(_at_once(other) for other in ops.others)
    return StepOps(ops.commit + ops.commit_ahead, [], ops.decommit, others)
