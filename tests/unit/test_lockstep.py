# SPDX-License-Identifier: Apache-2.0
"""Leader and replicas stay equal, whatever the engine and its neighbours do."""

from __future__ import annotations

import pickle
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvcached_core import ArenaShape, ElasticScheduler, Ledger, sglang_load
from kvcached_core._core import BlockAllocator
from kvcached_core.accounts import Account
from kvcached_core.holding import Holding
from kvcached_core.lockstep import Leader, Load, Need, PassOrder, Replica
from kvcached_core.plan import BlockRanges, StepOps
from kvcached_core.scheduler import geometry_of
from kvcached_core.sglang_load import load_of
from tests.support.little_sglang import Abort, Arrival, LittleSglang, Sampling
from tests.support.little_windows import LittleWindows

PAGE = 1 << 16


def another(ledger: Ledger) -> Ledger:
    return Ledger(ledger.path, ledger.capacity, ledger.headroom)


def ids(ranges: BlockRanges) -> set[int]:
    return {block for start, end in ranges for block in range(start, end)}


def state(allocator: BlockAllocator) -> tuple[Any, ...]:
    """All that decides what an allocator does next, but what was never used."""
    return (
        allocator.num_clean,
        allocator.num_live,
        allocator.num_uncommitted,
        allocator.parked_pages,
        allocator.live_array().tolist(),
        allocator.free_order(),
    )


class Group:
    """The ranks of one engine on one ledger; arenas are sets of blocks.

    With ``window_bytes`` it has a second pool, of blocks of that size.
    """

    def __init__(
        self,
        ledger: Ledger,
        num_ranks: int,
        num_blocks: int,
        block_bytes: int = PAGE // 4,
        join: dict[str, Any] | None = None,
        window_bytes: int | None = None,
        **policy: Any,
    ) -> None:
        self.ledger = ledger
        self.block_bytes = block_bytes
        self.member = ledger.join("engine", **(join or {}))
        sizes = [block_bytes] if window_bytes is None else [block_bytes, window_bytes]
        shapes = [ArenaShape(num_blocks, size, PAGE) for size in sizes]
        accounts = [
            Account(ledger, self.member, (num_ranks * PAGE,), num_ranks * size) for size in sizes
        ]
        self.scheduler = ElasticScheduler(
            num_blocks, shapes[:1], accounts[:1], holding=Holding(16), **{"decay_s": 1000, **policy}
        )
        for shape, account in zip(shapes[1:], accounts[1:], strict=True):
            self.scheduler.add_pool(num_blocks, [shape], [account], Holding(16))
        self.leader = Leader(self.scheduler, num_ranks)
        self.replicas = [
            Replica(*(BlockAllocator(num_blocks, [geometry_of(shape)]) for shape in shapes))
            for _ in range(num_ranks - 1)
        ]
        self.arenas: list[list[set[int]]] = [[{0} for _ in sizes] for _ in range(num_ranks)]
        """Of every rank and pool."""
        self.order = PassOrder()

    @property
    def ranks(self) -> list[list[BlockAllocator]]:
        """Of every rank the allocators of its pools."""
        first = [pool.allocator for pool in self.scheduler.pools]
        return [first, *([pool.allocator for pool in r.pools] for r in self.replicas)]

    @property
    def allocators(self) -> list[BlockAllocator]:
        return [pools[0] for pools in self.ranks]

    @property
    def allocator(self) -> BlockAllocator:
        return self.scheduler.allocator

    @property
    def nothing(self) -> Load:
        return Load((), (), (Need(0, 0, 0),) * len(self.scheduler.pools))

    def plan(self, load: Load | None = None, *, release: bool = True) -> StepOps:
        """A pass on every rank, and what their workers do."""
        order, ops = self.leader.plan(load or self.nothing)
        self.order = pickle.loads(pickle.dumps(order))  # as it travels
        done = [ops, *(replica.repeat(self.order) for replica in self.replicas)]
        for arenas, theirs in zip(self.arenas, done, strict=True):
            pairs = zip((ops, *ops.others), (theirs, *theirs.others), strict=True)
            for arena, (first, own) in zip(arenas, pairs, strict=True):
                grown = ids(own.commit)
                assert grown == ids(first.commit)
                assert ids(own.decommit) == ids(first.decommit)
                # The engine may take any clean block in this very pass.
                assert not own.commit_ahead
                assert not grown & arena
                arena |= grown
                assert ids(own.decommit) <= arena - {0}
                arena -= ids(own.decommit)
        self.check()
        if release:
            self.release()
        return ops

    def _backed(self) -> int:
        pages = sum(pool.allocator.committed_pages(0) for pool in self.scheduler.pools)
        return len(self.ranks) * PAGE * pages

    def release(self) -> None:
        """The workers have unmapped what they were told to."""
        held = self._backed()
        assert self.member.info().leased >= held
        self.member.release(self.member.info().leased - held)

    def check(self) -> None:
        first, *others = self.ranks
        for pools in others:
            assert [state(pool) for pool in pools] == [state(pool) for pool in first]
        for index, pool in enumerate(first):
            promised = set(pool.free_order()) | set(pool.live_array().tolist()) | {0}
            for arenas in self.arenas:
                assert arenas[index] == promised
        assert self.ledger.total_leased() <= self.ledger.capacity
        assert self._backed() <= self.member.info().leased

    def take(self, num_blocks: int) -> list[int]:
        """Blocks that go live on every rank."""
        taken = [allocator.allocate(num_blocks) for allocator in self.allocators]
        assert all(blocks == taken[0] for blocks in taken)
        return taken[0]

    def free(self, blocks: list[int]) -> None:
        for allocator in self.allocators:
            allocator.free(blocks)


@dataclass
class Tokens:
    """A request, as far as demand is sized by it."""

    num_tokens: int
    num_computed_tokens: int = 0


def load(
    needed: int = 0,
    *,
    running: Sequence[Tokens] = (),
    waiting: Sequence[Tokens] = (),
    running_blocks: int = 0,
    wanted: int = 0,
    first: int = 0,
) -> Load:
    need = Need(running_blocks, needed, max(needed, wanted), first)
    return Load(running, waiting, (need,))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    yield Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)


def make(ledger: Ledger, ranks: int = 2, block_bytes: int = PAGE, **policy: Any) -> Group:
    return Group(ledger, ranks, 1000, block_bytes, **policy)


def test_a_pass_grows_by_what_it_needs_on_every_rank(ledger: Ledger) -> None:
    group = make(ledger)
    ops = group.plan(load(10))
    assert group.allocator.num_clean == 10
    assert ids(ops.commit) == set(range(1, 11))
    assert ledger.total_leased() == 2 * 11 * PAGE
    assert group.order.acts == (("grow", 10, 0),)
    group.take(4)
    assert not group.plan(load(6)).commit  # there already
    assert group.order.acts == ()
    group.plan(load(9))
    assert group.allocator.num_clean == 9


def test_one_rank_has_nobody_to_tell(ledger: Ledger) -> None:
    group = make(ledger, ranks=1)
    assert group.plan(load(10)).commit
    assert group.order.acts == ()
    assert group.order.room().reachable_blocks == 64 - 11  # and tells itself exactly


def test_pages_for_growth_to_come_are_committed_on_every_rank(ledger: Ledger) -> None:
    group = make(ledger, ahead_bytes=4 * PAGE)
    ops = group.plan(load(1))
    assert ids(ops.commit) == {1, 2, 3, 4, 5}
    assert group.order.acts == (("grow", 1, 0), ("grow", 4, 0))
    group.take(5)
    assert ids(group.plan(load(6)).commit) == set(range(6, 16))


def test_what_has_its_blocks_looks_at_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.scheduler._LOOK_S", 3600.0)
    group = make(ledger, ahead_bytes=4 * PAGE)
    for _ in range(2):
        group.plan(load(4))
    room = group.order.room()
    looked = 0

    def look(*args: Any) -> int:
        nonlocal looked
        looked += 1
        return room.reachable_blocks

    monkeypatch.setattr(group.scheduler, "growable_blocks", look)
    for _ in range(3):
        assert group.plan(load(4)) == StepOps([], [], [])
        assert group.order == PassOrder((), (room,))
    assert not looked
    # What it lacks, what it wants and who waits end that.
    for more in (load(9), load(1, wanted=100), load(1, waiting=[Tokens(16)])):
        group.plan(more)
        assert looked
        looked = 0
        group.plan(load())
        looked = 0


def test_quiet_passes_commit_and_park_as_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for look_s in (0.0, 3600.0):
        monkeypatch.setattr("kvcached_core.scheduler._LOOK_S", look_s)
        ledger = Ledger(str(tmp_path / f"{look_s}.ledger"), 256 * PAGE)
        group = make(ledger, ahead_bytes=2 * PAGE, block_bytes=PAGE // 4)
        group.plan(load(1))
        held: list[int] = []
        steps = []
        for step in range(200):
            # As in a decode: most passes take nothing, and at times a request ends.
            new = 3 if step % 5 == 0 else 0
            ops = group.plan(load(new))
            held += group.take(new)
            if step % 20 == 19:
                group.free(held[:6])
                held = held[6:]
            steps.append((ids(ops.commit), ids(ops.decommit), group.member.info().parked))
        seen.append(steps)
        assert group.scheduler.quiet == (look_s > 0)
    assert seen[0] == seen[1]
    assert sum(bool(grown) for grown, _, _ in seen[0]) > 3


def test_who_waits_ends_the_quiet_of_a_group(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.scheduler._LOOK_S", 3600.0)
    group = make(ledger, parked_bytes=64 * PAGE)
    group.plan(load(31))
    group.plan(load(2))
    neighbour = another(ledger).join("neighbour")
    neighbour.set_demand(20 * PAGE)
    assert len(ids(group.plan(load(2)).decommit)) >= 10
    assert group.allocator.num_clean >= 2


def test_it_takes_what_there_is_and_posts_the_rest(ledger: Ledger) -> None:
    group = make(ledger)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(40 * PAGE)
    group.plan(load(20, waiting=[Tokens(16 * 20)]))
    assert group.allocator.num_clean == 11
    assert group.order.acts == (("grow", 11, 0),)
    assert group.member.info().demand == 9 * 2 * PAGE
    assert group.member.info().waiting == 1
    neighbour.release(40 * PAGE)
    group.plan(load(20))
    assert group.allocator.num_clean == 20
    assert group.member.info().demand == 0


def test_what_runs_goes_before_what_an_equal_waits_for(ledger: Ledger) -> None:
    group = make(ledger, ranks=1)
    group.plan(load(30))
    group.take(30)
    neighbour = another(ledger).join("neighbour")
    neighbour.set_demand(40 * PAGE, 1)
    running, waiting = [Tokens(470)], [Tokens(64)]
    group.plan(load(6, running_blocks=2, running=running, waiting=waiting, wanted=6, first=4))
    assert group.allocator.num_clean == 2  # and none for the one that waits here


def test_what_the_first_request_wants_before_it_is_let_in_is_posted(ledger: Ledger) -> None:
    group = make(ledger)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(40 * PAGE)
    # 24 pages are left: 12 on each rank, one of them the null block's.
    group.plan(load(5, wanted=11, waiting=[Tokens(80)]))
    assert group.member.info().demand == 0
    group.plan(load(5, wanted=15, waiting=[Tokens(80)]))
    assert group.allocator.num_clean == 5
    # All it does not hold: 6 more blocks could be leased, and the plan counts them as free.
    assert group.member.info().demand == 10 * 2 * PAGE
    neighbour.release(8 * PAGE)
    group.plan(load(5, wanted=15))
    assert group.member.info().demand == 0
    assert group.allocator.num_clean == 5


def test_a_cache_that_can_give_way_is_no_shortage(ledger: Ledger) -> None:
    group = make(ledger, ranks=1)
    engine = LittleSglang(group.allocator)
    group.scheduler.queue = engine.tree
    group.plan(load(63))
    engine.tree.add(engine.tree.root, 0, group.take(40), 1)
    group.take(20)
    group.plan(load(43))
    assert group.member.info().demand == 0
    group.plan(load(44))
    assert group.member.info().demand == PAGE
    group.plan(load(3, wanted=45))
    assert group.member.info().demand == 2 * PAGE


def test_a_pass_that_gives_takes_nothing_and_wants_nothing(ledger: Ledger) -> None:
    group = make(ledger)
    group.plan(load(20))
    other = another(ledger).join("other", priority=1)
    other.set_demand(64 * PAGE, 1)
    ops = group.plan(load(30))
    assert ops.decommit and not ops.commit
    assert group.member.info().demand == 0
    assert group.allocator.num_clean == 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("pages_per_block", [1, 2])
def test_blocks_are_withheld_when_running_requests_must_go(
    ledger: Ledger, ranks: int, pages_per_block: int
) -> None:
    group = make(ledger, ranks, pages_per_block * PAGE)
    page = ranks * pages_per_block * PAGE  # that a block costs
    group.plan(load(12))
    held = group.take(12)
    running = [Tokens(16 * 6, 16 * 6)] * 2
    group.plan(load(running=running))
    assert group.order.room().withheld_blocks == 0
    operator = another(ledger)
    operator.set_policy(group.member.slot, group.member.generation, limit=9 * page)
    group.plan(load(running=running))
    assert group.order.room().withheld_blocks == 4
    # What it freed for that is not handed out again; what it did not free is asked for later.
    group.plan(load(running=running))
    assert group.order.room().withheld_blocks == 0
    group.free(held[6:])
    group.plan(load(running=running[:1]))
    assert ledger.total_leased() <= 9 * page
    assert group.order.room().withheld_blocks == 0
    assert group.scheduler.counters["preemptions"] == 1


def test_running_requests_are_asked_again_after_some_passes(ledger: Ledger) -> None:
    group = make(ledger)
    group.plan(load(12))
    group.take(12)
    operator = another(ledger)
    operator.set_policy(group.member.slot, group.member.generation, limit=2 * 9 * PAGE)
    withheld = []
    for _ in range(7):
        group.plan(load(running=[Tokens(16 * 12, 16 * 12)]))
        withheld.append(group.order.room().withheld_blocks)
    assert withheld == [4, 0, 0, 4, 0, 0, 4]


@pytest.mark.parametrize("block_bytes", [PAGE // 4, PAGE * 3 // 4, PAGE, PAGE * 9 // 8, 2 * PAGE])
def test_memory_for_this_pass_does_not_decay(tmp_path: Path, block_bytes: int) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 256 * PAGE)
    group = make(ledger, block_bytes=block_bytes, decay_s=0.0)
    for _ in range(4):
        group.plan(load(20))
        assert group.allocator.num_clean >= 20
    group.plan(load(20, running_blocks=3))
    assert group.allocator.num_clean >= 20
    for _ in range(2):
        group.plan(load(7))
    assert 7 <= group.allocator.num_clean < 20
    for _ in range(2):
        group.plan()
    assert group.allocator.parked_pages == 0


def test_what_is_too_little_for_those_who_wait_may_go_to_others(ledger: Ledger) -> None:
    group = make(ledger)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(20 * PAGE)
    group.plan(load(20, running_blocks=2))
    assert group.member.info().parked == 0  # this pass takes it all
    group.plan(load(30, running_blocks=2))
    assert group.allocator.num_clean == 21
    assert group.member.info().parked == 2 * 19 * PAGE


def test_what_is_too_little_decays_and_comes_back_when_it_suffices(ledger: Ledger) -> None:
    group = make(ledger, decay_s=0.0)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(40 * PAGE)
    for _ in range(2):
        group.plan(load(20, running_blocks=2))
    assert group.allocator.num_clean == 2
    neighbour.release(30 * PAGE)
    group.plan(load(20, running_blocks=2))
    group.plan(load(20, running_blocks=2))
    assert group.allocator.num_clean == 20


def test_a_block_may_come_and_go_in_one_pass(ledger: Ledger) -> None:
    group = make(ledger)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(40 * PAGE)
    group.plan(load(5))
    group.take(5)
    another(ledger).trim(group.member.slot, group.member.generation, 2 * 4 * PAGE)
    ops = group.plan(load(20))  # there are 6, too few
    assert ids(ops.commit) == set(range(6, 12)) and ids(ops.decommit) == set(range(8, 12))
    assert group.allocator.num_clean == 2  # and Group looks at every rank


def test_an_idle_engine_shrinks_after_a_while(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("kvcached_core.scheduler.time.monotonic", lambda: now)
    group = make(ledger, decay_s=2.0, parked_bytes=3 * PAGE)
    group.plan(load(20))
    group.plan()
    now += 2.1
    assert group.scheduler.wants_step()
    group.plan()
    assert group.allocator.num_clean == 20  # a period that began with all of it in need
    now += 2.1
    assert group.scheduler.wants_step()
    group.plan()
    assert group.allocator.parked_pages == 3
    assert ledger.total_leased() == 2 * 4 * PAGE


def test_who_waits_beside_others_takes_all_of_its_prompt_or_nothing(ledger: Ledger) -> None:
    group = make(ledger, ranks=1)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(31 * PAGE)
    neighbour.set_demand(PAGE, 1)
    request = Tokens(16 * 20)
    group.plan(load(5, waiting=[request], wanted=40, first=21, running_blocks=2))
    assert group.allocator.num_clean == 2  # 32 could be had
    assert group.member.info().demand == (40 - 2) * PAGE
    group.plan(load(5, waiting=[request], wanted=30, first=21, running_blocks=2))
    assert group.allocator.num_clean == 21
    assert group.order.room().reachable_blocks >= 9


def test_what_lets_a_request_in_is_told_though_taking_it_costs_the_rank(ledger: Ledger) -> None:
    group = make(ledger)
    other = another(ledger).join("other")
    assert other.lease(10 * PAGE)
    other.set_demand(20 * PAGE, 1)
    assert group.member.claimable() == 52 * PAGE
    group.plan(load(5, waiting=[Tokens(16 * 20)], wanted=25, first=21))
    assert group.allocator.num_clean == 21
    assert group.member.claimable() == 0  # now the other is before it
    assert group.order.room().reachable_blocks == 4
    assert group.member.info().demand == 0


@pytest.mark.parametrize("block_bytes", [PAGE // 4, PAGE])
def test_a_bounded_cache_is_the_same_on_every_rank(ledger: Ledger, block_bytes: int) -> None:
    group = make(ledger, 3, block_bytes, join={"cache_limit": 3 * 5 * PAGE})
    engine = Engine(group)
    group.plan(load(8 * PAGE // block_bytes))
    half = 4 * PAGE // block_bytes
    for blocks in (group.take(half), group.take(half)):
        for rank in engine.ranks:
            rank.tree.add(rank.tree.root, 0, blocks, 1)
    group.plan()
    assert ("keep", 5 * PAGE // block_bytes, 0) in group.order.acts
    assert [rank.tree.num_cached for rank in engine.ranks] == [half] * 3


def test_pages_of_the_cache_are_emptied_on_every_rank(ledger: Ledger) -> None:
    group = make(ledger, 3)
    engine = Engine(group)
    group.plan(load(10))
    for blocks in (group.take(4), group.take(6)):
        for rank in engine.ranks:
            rank.tree.add(rank.tree.root, 0, blocks, blocks[0])
    group.plan()
    neighbour = another(ledger).join("neighbour")
    neighbour.set_demand((64 - 3 * 8) * PAGE, 1)
    ops = group.plan()
    # The older node goes whole, and of its pages as many as were asked for.
    assert ids(ops.decommit) == {2, 3, 4} and group.allocator.num_clean == 1
    assert [rank.tree.num_cached for rank in engine.ranks] == [6] * 3


def test_what_could_be_had_is_told_in_steps_but_never_too_little(ledger: Ledger) -> None:
    group = make(ledger)  # 1000 virtual blocks: told in steps of 15
    group.plan()
    assert group.order.room().reachable_blocks == 30
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(40 * PAGE)
    group.plan(load(1))
    assert group.order.room().reachable_blocks == 0  # of 10
    group.plan(load(1, wanted=8))
    assert group.order.room().reachable_blocks >= 7
    group.plan(load(1, wanted=100))
    assert group.order.room().reachable_blocks == 10


class Engine:
    """A small SGLang of several ranks, each over its rank's allocator."""

    def __init__(self, group: Group, *, with_cache: bool = True, **settings: Any) -> None:
        self.group = group
        windows = len(group.scheduler.pools) > 1
        kind: Any = LittleWindows if windows else LittleSglang
        self.ranks = [kind(*pools, keeps_prefixes=with_cache, **settings) for pools in group.ranks]
        chunk = self.ranks[0].chunked_prefill_size
        self.kinds = [sglang_load.Tokens(16)]
        if windows:
            self.kinds.append(sglang_load.Tokens(16, self.ranks[0].window_tokens, chunk))
        pools = [group.scheduler.pools, *(replica.pools for replica in group.replicas)]
        for theirs, rank in zip(pools, self.ranks, strict=True) if with_cache else ():
            theirs[0].cache = rank.tree
            if windows:
                theirs[1].cache = rank.tree.windows
        self.lazy = False
        """Whether its workers take their time to unmap."""
        self._busy = False

    def turn(self, received: Sequence[Any] = ()) -> None:
        """One turn of the event loop on every rank, with a pass if there is a reason."""
        load = load_of(self.ranks[0], received, 16, self.kinds)
        busy, self._busy = self._busy, load is not None
        if self.group.scheduler.attend() or load is not None or busy:
            for rank in self.ranks:
                rank.land()
            self._plan(load or self.group.nothing)
        for rank in self.ranks:
            rank.order = self.group.order
            rank.step(received)
            rank.land()
        self.group.check()
        told = [(r.finished, r.retracted, [q.rid for q in r.waiting_queue]) for r in self.ranks]
        assert all(other == told[0] for other in told)

    def _plan(self, load: Load) -> None:
        counters = self.group.scheduler.counters
        allocators = [pool.allocator for pool in self.group.scheduler.pools]
        before, asks = [a.num_clean for a in allocators], counters["reclaim_steps"]
        self.group.plan(load, release=not self.lazy)
        if counters["reclaim_steps"] == asks:
            # Nobody asked, so what the pass needs stays; if others wait, what is running needs.
            contended = self.group.scheduler.contended
            for allocator, clean, need in zip(allocators, before, load.needs, strict=True):
                for needed in (need.running_blocks, 0 if contended else need.needed_blocks):
                    # Of several pools one may give to the other.
                    assert len(allocators) > 1 or clean < needed or allocator.num_clean >= needed

    def is_idle(self) -> bool:
        return self.ranks[0].is_idle()

    def most_blocks(self) -> int:
        """What its largest request may take."""
        rank = self.ranks[0]
        requests = [*rank.running_batch.reqs, *rank.waiting_queue]
        requests += rank.last_batch.reqs if rank.last_batch is not None else []
        requests += [rank.chunked_req] if rank.chunked_req is not None else []
        tokens = max((len(request) + request.to_come for request in requests), default=0)
        return -(-tokens // 16) + 3

    def most_windows(self) -> int:
        """The same of the second pool."""
        window = self.kinds[-1].holding.most_blocks
        return self.most_blocks() if window is None else min(self.most_blocks(), window + 3)


REQUESTS = st.tuples(  # prompt, most tokens to make, tokens it makes, topic
    st.integers(1, 400), st.integers(1, 300), st.integers(1, 40), st.integers(0, 2)
)


class LockstepMachine(RuleBasedStateMachine):
    """Three ranks run a small SGLang each, beside a neighbour that takes, wants and gives back."""

    ranks = 3

    @initialize(
        block_bytes=st.sampled_from([PAGE // 4, PAGE // 3 + 16, PAGE, PAGE]),
        num_blocks=st.sampled_from([150, 1000]),
        chunk=st.sampled_from([32, 64, None]),
        prefill=st.sampled_from([48, 200]),
        parked=st.integers(0, 4),
        ahead=st.integers(0, 4),
        decay=st.sampled_from([0.0, 1000.0]),
        priority=st.integers(0, 1),
        with_cache=st.booleans(),
        window_bytes=st.sampled_from([None, PAGE // 8, PAGE // 2 + 16, PAGE]),
    )
    def start(
        self,
        block_bytes: int,
        num_blocks: int,
        chunk: int | None,
        prefill: int,
        parked: int,
        ahead: int,
        decay: float,
        priority: int,
        with_cache: bool,
        window_bytes: int | None,
    ) -> None:
        self.folder = tempfile.mkdtemp()
        # For 120 blocks on every rank.
        pages = -(-120 * block_bytes // PAGE) - (-120 * (window_bytes or 0) // PAGE)
        self.ledger = Ledger(f"{self.folder}/host-0.ledger", pages * self.ranks * PAGE)
        self.operator = another(self.ledger)
        self.neighbour = another(self.ledger).join("neighbour", priority=priority)
        self.group = Group(
            self.ledger,
            self.ranks,
            num_blocks,
            block_bytes,
            window_bytes=window_bytes,
            parked_bytes=parked * PAGE,
            ahead_bytes=ahead * PAGE,
            decay_s=decay,
        )
        self.engine = Engine(
            self.group,
            with_cache=with_cache,
            chunked_prefill_size=chunk,
            max_prefill_tokens=prefill,
        )
        self.arrived = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            try:
                self.everybody_is_served_in_the_end()
            finally:
                shutil.rmtree(self.folder)

    def everybody_is_served_in_the_end(self) -> None:
        """The neighbour keeps what it can beside the largest request of all."""
        self.engine.lazy = False
        self.group.release()
        self.neighbour.set_demand(0)
        most = [self.engine.most_blocks(), self.engine.most_windows()]
        pages = sum(
            2 + -(-blocks * pool.block_bytes // PAGE)
            for blocks, pool in zip(most, self.group.scheduler.pools, strict=False)
        )
        held = self.neighbour.info().leased
        room = self.ledger.capacity - held
        self.neighbour.release(min(held, max(0, pages * self.ranks * PAGE - room)))
        self.change(limit=-1, cache_limit=-1)
        for _ in range(2000):
            if self.engine.is_idle():
                break
            self.engine.turn()
        assert self.engine.is_idle(), "somebody waits for ever"
        for _ in range(4):
            self.engine.turn()
        info = self.group.member.info()
        assert info.demand == 0
        assert info.observed_version == info.desired_version
        assert not info.trim_pending

    def change(self, **policy: int) -> None:
        member = self.group.member
        self.operator.set_policy(member.slot, member.generation, **policy)

    @rule(passes=st.integers(1, 25))
    def run(self, passes: int) -> None:
        for _ in range(passes):
            self.engine.turn()

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4), passes=st.integers(0, 12))
    def arrive(self, requests: list[tuple[int, int, int, int]], passes: int) -> None:
        arrivals = []
        for prompt, most, answer, topic in requests:
            self.arrived += 1
            arrivals.append(Arrival(self.arrived, range(prompt), Sampling(most), answer, topic))
        self.engine.turn(arrivals)
        self.run(passes)

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.turn([Abort(data.draw(st.integers(1, self.arrived)))])

    @rule(takes=st.booleans(), share=st.sampled_from([0.1, 0.3, 0.6, 1.0]))
    def neighbour_moves(self, takes: bool, share: float) -> None:
        if takes:
            self.neighbour.lease_up_to(int(self.ledger.capacity * share), PAGE)
        else:
            self.neighbour.release(int(self.neighbour.info().leased * share))

    @rule(share=st.sampled_from([0.0, 0.02, 0.2, 0.5, 1.0]))
    def neighbour_wants(self, share: float) -> None:
        self.neighbour.set_demand(int(self.ledger.capacity * share), 1)

    @rule(
        name=st.sampled_from(["limit", "cache_limit"]),
        share=st.sampled_from([0.0, 0.1, 0.3, 0.7, None]),
    )
    def operator_limits(self, name: str, share: float | None) -> None:
        self.change(**{name: -1 if share is None else int(self.ledger.capacity * share)})

    @rule(pages=st.sampled_from([-1, 1, 5]), cached=st.booleans())
    def operator_trims(self, pages: int, cached: bool) -> None:
        member = self.group.member
        num_bytes = pages * self.ranks * PAGE if pages > 0 else -1
        self.operator.trim(member.slot, member.generation, num_bytes, cached)

    @rule()
    def workers_lag(self) -> None:
        self.engine.lazy = not self.engine.lazy
        if not self.engine.lazy:
            self.group.release()


LockstepMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLockstep = LockstepMachine.TestCase


class Neighbours:
    """Engines on the same memory, with four blocks on a page, and their clock."""

    def __init__(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        rng: random.Random,
        *,
        caches: int,
        count: int = 2,
        pages: int = 30,
        window_bytes: int | None = None,
        **settings: Any,
    ) -> None:
        self._now = 100.0
        monkeypatch.setattr("kvcached_core.scheduler.time.monotonic", lambda: self._now)
        ledger = Ledger(str(tmp_path / "host-0.ledger"), pages * PAGE)
        self.engines = []
        for index in range(count):
            policy = {"parked_bytes": 2 * PAGE, "ahead_bytes": rng.choice([0, 2 * PAGE])}
            group = Group(
                another(ledger), 1, 400, PAGE // 4, window_bytes=window_bytes, decay_s=2.0, **policy
            )
            cached = index < caches
            engine = Engine(group, with_cache=cached, gives_chunks_up=True, **settings)
            self.engines.append(engine)

    def serve(self, passes: int) -> bool:
        """Whether all they have is done in so many passes."""
        for _ in range(passes):
            if all(engine.is_idle() for engine in self.engines):
                return True
            for engine in self.engines:
                engine.turn()
            self._now += 0.01
        return False


@pytest.mark.parametrize("caches", [1, 2])
@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("seed", [0, 1, 4, 6, 7, 9, 19, 21])
def test_two_engines_that_want_more_than_half_both_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None, caches: int, seed: int
) -> None:
    rng = random.Random(seed)
    settings = {"chunked_prefill_size": chunk, "max_prefill_tokens": 200}
    pair = Neighbours(tmp_path, monkeypatch, rng, caches=caches, **settings)
    for engine in pair.engines:
        lengths = [rng.choice([rng.randint(1, 200), rng.randint(900, 1600)]) for _ in range(4)]
        engine.turn(
            [
                Arrival(i, range(length), Sampling(rng.randint(1, 200)), rng.randint(1, 60), i % 3)
                for i, length in enumerate(lengths)
            ]
        )
    assert pair.serve(5000), "they wait for each other for ever"


@pytest.mark.parametrize("chunk", [None, 256])
@pytest.mark.parametrize("window_bytes", [None, PAGE // 8])
@pytest.mark.parametrize("seed", [5, 10, 13, 15, 18, 20])
def test_many_that_wait_in_two_engines_are_all_served_and_soon(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int | None,
    window_bytes: int | None,
    seed: int,
) -> None:
    """A prefill may have more of them than there is memory for, however few could run."""
    rng = random.Random(seed)
    settings = {"chunked_prefill_size": chunk, "max_prefill_tokens": 2000}
    pair = Neighbours(tmp_path, monkeypatch, rng, caches=1, window_bytes=window_bytes, **settings)
    for engine in pair.engines:
        arrivals = []
        for i in range(rng.randint(2, 12)):
            length = rng.choice([rng.randint(50, 250), rng.randint(300, 700)])
            most, answer = rng.randint(1, 200), rng.randint(1, 60)
            arrivals.append(Arrival(i, range(length), Sampling(most), answer, i % 3))
        engine.turn(arrivals)
    # Each after the other they would take 700 passes; in no pass may both stand still for long.
    assert pair.serve(500), "somebody waits for what nobody uses"


@pytest.mark.parametrize("seed", range(3))
def test_bursts_that_do_not_fit_together_are_not_computed_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("kvcached_core.scheduler._STARVED_PAUSE_MS", 0)
    rng = random.Random(seed)
    settings = {"chunked_prefill_size": 256, "max_prefill_tokens": 1000, "ratio": 0.1}
    four = Neighbours(tmp_path, monkeypatch, rng, caches=0, count=4, pages=60, **settings)
    for engine in four.engines:
        lengths = [(rng.randint(200, 400), rng.randint(60, 200)) for _ in range(12)]
        engine.turn(
            [
                Arrival(i, range(n), Sampling(200), answer, i)
                for i, (n, answer) in enumerate(lengths)
            ]
        )
    assert four.serve(1500)
    # Of 48 requests 25 to 33 were, while what ran gave way to what waited.
    assert sum(engine.ranks[0].retracted for engine in four.engines) < 16
