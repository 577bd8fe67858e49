# SPDX-License-Identifier: Apache-2.0
"""Several pools of an engine share one membership: lease, demand, asks, bounds and trims."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace as NS

import pytest

from kvcached_core import ArenaShape, Ledger
from kvcached_core.accounts import Account
from kvcached_core.holding import Holding
from kvcached_core.lockstep import Load, Need
from kvcached_core.sglang_load import States, load_of, most_tokens, pool_tokens
from kvcached_core.sglang_load import Tokens as TokenBlocks
from tests.unit.test_lockstep import PAGE, Engine, Group, Tokens, another, ids

FULL, WINDOW = PAGE // 2, PAGE  # bytes of a block


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    yield Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)


def make(ledger: Ledger, ranks: int = 1, **policy: float) -> Group:
    return Group(ledger, ranks, 400, FULL, window_bytes=WINDOW, **policy)


def load(full: int, window: int, *, waiting: int = 0, running: int = 0, **windows: int) -> Load:
    """So many blocks are needed of each pool; with ``waiting``, by a request of so many tokens."""
    wanted, first = windows.get("wanted", window), windows.get("first", window)
    needs = (Need(running, full, full, full), Need(running, window, max(window, wanted), first))
    return Load((), [Tokens(waiting)] if waiting else (), needs)


def clean(group: Group) -> list[int]:
    return [pool.allocator.num_clean for pool in group.scheduler.pools]


def held(group: Group) -> list[int]:
    """Pages of each pool on a rank."""
    return [pool.allocator.committed_pages(0) for pool in group.scheduler.pools]


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_pools_grow_on_one_lease(tmp_path: Path, ranks: int) -> None:
    group = make(Ledger(str(tmp_path / "host-0.ledger"), 64 * ranks * PAGE), ranks)
    assert group.member.info().leased == ranks * 2 * PAGE  # a page for each null block
    assert group.member.info().pinned == ranks * 2 * PAGE
    ops = group.plan(load(9, 5))
    assert clean(group) == [9, 5]
    assert ids(ops.commit) == set(range(1, 10)) and ids(ops.others[0].commit) == set(range(1, 6))
    assert group.member.info().leased == ranks * (5 + 6) * PAGE
    if ranks > 1:
        assert group.order.acts == (("grow", 9, 0), ("grow", 5, 1))


def test_every_pool_needs_memory_for_its_null_block(ledger: Ledger) -> None:
    other = another(ledger).join("other")
    assert other.lease(63 * PAGE)
    with pytest.raises(MemoryError):
        make(ledger)
    other.release(PAGE)
    make(ledger)


def test_what_running_requests_need_of_both_comes_before_what_others_may_take(
    ledger: Ledger,
) -> None:
    group = make(ledger)
    other = another(ledger).join("other")
    assert other.lease(50 * PAGE)  # 12 are left
    group.plan(load(100, 30, running=4, waiting=1600))
    full, window = clean(group)
    assert full >= 4 and window >= 4


def test_demand_is_the_sum_of_what_both_lack(ledger: Ledger) -> None:
    group = make(ledger)
    other = another(ledger).join("other")
    assert other.lease(62 * PAGE)
    group.plan(load(20, 7, waiting=320))
    assert group.member.info().demand == (19 // 2 + 7) * PAGE + PAGE  # one block lies on page 0
    other.release(62 * PAGE)
    group.plan(load(20, 7))
    assert clean(group) == [21, 7]  # two blocks to a page
    assert group.member.info().demand == 0


def test_what_could_be_had_of_one_is_not_promised_to_the_other_as_well(ledger: Ledger) -> None:
    group = make(ledger)
    group.plan(load(1, 1, waiting=16, wanted=31))
    rooms = group.order.rooms
    left = 64 - sum(held(group))
    assert rooms[1].reachable_blocks == left
    assert rooms[0].reachable_blocks == (left - 30) * 2  # 30 pages are for the windows


def test_unused_pages_of_one_pool_are_for_the_other(ledger: Ledger) -> None:
    group = make(ledger)
    group.plan(load(1, 60))
    assert held(group)[1] == 61
    group.plan(load(40, 1))  # 3 pages are free, 20 are wanted
    assert clean(group)[0] < 40
    assert group.member.info().demand == 0  # its own pages suffice
    group.plan(load(40, 1))
    assert clean(group)[0] == 41
    assert held(group)[1] >= 61 - 20 - 2


def test_no_more_is_given_to_the_other_pool_while_some_is_on_its_way(ledger: Ledger) -> None:
    group = make(ledger)
    group.plan(load(1, 60))
    for _ in range(5):
        group.plan(load(40, 1), release=False)
    assert held(group)[1] >= 61 - 20 - 2
    group.release()
    group.plan(load(40, 1))
    assert clean(group)[0] == 41


def test_cached_windows_are_for_the_other_pool_before_anybody_is_asked(ledger: Ledger) -> None:
    group = make(ledger)
    engine = Engine(group)
    group.plan(load(40, 40))
    rank = engine.ranks[0]
    blocks = rank._take(40)
    node = rank.tree.add(rank.tree.root, 0, blocks, 1)
    node.locks += 1  # a long prompt that is computed: its windows may go, its tokens may not
    assert group.scheduler.pools[1].num_cached == 40
    for _ in range(3):
        group.plan(load(30, 2))
        assert group.member.info().demand == 0
    assert clean(group)[0] >= 30
    assert group.scheduler.pools[1].num_cached == 0
    assert node.number in rank.tree.windowless


def test_an_ask_is_answered_from_both_caches_in_proportion(ledger: Ledger) -> None:
    group = make(ledger)
    engine = Engine(group)
    group.plan(load(40, 40))
    rank = engine.ranks[0]
    for i in range(20):
        rank.tree.add(rank.tree.root, i, rank._take(2), i)
    group.plan()
    before = [pool.num_cached for pool in group.scheduler.pools]
    assert before == [40, 40]
    neighbour = another(ledger).join("neighbour")
    neighbour.set_demand((64 - sum(held(group)) + 20) * PAGE, 1)
    group.plan()
    assert neighbour.claimable() >= 20 * PAGE
    kept = [pool.num_cached for pool in group.scheduler.pools]
    # A third of all was asked for; nodes go whole.
    assert all(20 <= blocks <= 30 for blocks in kept)
    oldest = [node.topic for node in rank.tree.nodes()]
    assert min(oldest) >= 5, "the oldest went first"


def test_running_requests_free_of_both_pools(ledger: Ledger) -> None:
    group = make(ledger)
    group.plan(load(20, 20))
    for pool in group.scheduler.pools:
        pool.allocator.allocate(20)
    requests = [Tokens(16 * 10, 16 * 10)] * 2
    operator = another(ledger)
    operator.set_policy(group.member.slot, group.member.generation, limit=(32 - 9) * PAGE)
    needs = (Need(0, 0, 0),) * 2
    group.plan(Load(requests, (), needs))
    full, window = (room.withheld_blocks for room in group.order.rooms)
    # A third of 27 pages is in the first pool, whose blocks are half as large.
    assert (full * FULL + window * WINDOW) // PAGE in (9, 10)
    assert 5 <= full <= 7 and 5 <= window <= 7


def test_a_cache_bound_holds_for_both_together(ledger: Ledger) -> None:
    group = Group(ledger, 1, 400, FULL, window_bytes=WINDOW, join={"cache_limit": 15 * PAGE})
    engine = Engine(group)
    group.plan(load(20, 20))
    rank = engine.ranks[0]
    for i in range(10):
        rank.tree.add(rank.tree.root, i, rank._take(2), i)
    assert group.scheduler.attend()
    group.plan()
    full, window = (pool.num_cached for pool in group.scheduler.pools)
    assert 8 * PAGE <= full * FULL + window * WINDOW <= 15 * PAGE
    assert group.member.info().cached == full * FULL + window * WINDOW
    group.scheduler.attend()
    info = group.member.info()
    assert info.observed_version == info.desired_version


def test_a_trim_empties_both(ledger: Ledger) -> None:
    group = make(ledger)
    engine = Engine(group)
    group.plan(load(20, 20))
    rank = engine.ranks[0]
    rank.tree.add(rank.tree.root, 0, rank._take(20), 1)
    group.plan()
    another(ledger).trim(group.member.slot, group.member.generation, -1, cached=True)
    group.plan()
    assert held(group) == [1, 1]
    group.plan()
    group.scheduler.attend()
    assert group.member.info().leased == 2 * PAGE
    assert not group.member.info().trim_pending


def test_each_pool_decays_for_itself(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("kvcached_core.scheduler.time.monotonic", lambda: now)
    group = make(ledger, decay_s=2.0, parked_bytes=4 * PAGE)
    group.plan(load(20, 20))
    for _ in range(3):
        group.plan(load(20, 0))
        now += 2.1
    assert held(group) == [11, 1 + 2]
    for _ in range(3):
        group.plan()
        now += 2.1
    assert held(group) == [1 + 2, 1 + 2]
    assert not group.scheduler.wants_step()


# -- sizes --------------------------------------------------------------------------------------


def test_a_request_holds_a_window_and_the_chunks_in_flight() -> None:
    assert most_tokens(None, 512, 16) is None
    assert most_tokens(1024, None, 16) is None
    assert most_tokens(1024, 512, 16) == 2048 + 32
    assert most_tokens(100, 100, 16) == 304 + 32


@pytest.mark.parametrize("chunk", [None, -1, 128, 4096])
@pytest.mark.parametrize("num_bytes", [1 << 20, 1 << 24, 1 << 33])
def test_the_largest_request_finds_room_for_its_window(num_bytes: int, chunk: int | None) -> None:
    full, window = pool_tokens(num_bytes, 16, 2048, 6144, 1024, chunk)
    assert full % 16 == window % 16 == 0
    assert window <= full
    holds = most_tokens(1024, chunk if chunk and chunk > 0 else None, 16) or full
    assert full * 2048 + min(full, holds) * 6144 <= num_bytes
    if num_bytes == 1 << 33 and chunk == 128:
        assert full * 2048 > 0.99 * num_bytes  # windows take next to nothing
        assert window * 6144 > 0.99 * num_bytes  # and may take all


# -- states -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "new", "held", "needs"),
    [
        (0, 0, 0, (0, 0, 0)),
        (2, 0, 0, (6, 6, 6)),
        (2, 3, 4, (2, 11, 11)),
        (2, 0, 9, (0, 0, 0)),  # a request gave up what others take
    ],
)
def test_states_are_there_before_a_request_is(
    running: int, new: int, held: int, needs: tuple[int, int, int]
) -> None:
    need = States(3, held).need(running, new, False)
    assert (need.running_blocks, need.needed_blocks, need.wanted_blocks) == needs


def test_a_waiting_request_wants_its_states_though_none_may_be_let_in_now() -> None:
    need = States(3, 6).need(2, 0, True)
    assert (need.needed_blocks, need.wanted_blocks, need.first_blocks) == (0, 3, 3)


def test_a_state_is_no_matter_of_length(ledger: Ledger) -> None:
    group = make(ledger)
    pool = group.scheduler.add_pool(
        20,
        [ArenaShape(20, 3 * PAGE, PAGE, segments=2)],
        [Account(ledger, group.member, (2 * PAGE,), 6 * PAGE)],
        Holding(1, fixed_blocks=3),
    )
    assert pool.holding.blocks_of(1) == pool.holding.blocks_of(10_000) == 3
    assert pool.holding.next_blocks_of(1, 10_000) == 0
    assert pool.page_bytes == 2 * PAGE and pool.block_bytes == 6 * PAGE
    # The null slot's pages: three in each of two layers.
    assert group.member.info().leased == (2 + 6) * PAGE
    other = another(ledger).join("other")
    assert other.lease(ledger.available())
    needs = (*(Need(0, 0, 0, 0),) * 2, States(3).need(0, 1, True))
    group.scheduler.begin_pass()
    group.scheduler.note_shortage(*(need.wanted_blocks for need in needs))
    assert group.member.info().demand == 3 * 6 * PAGE


SLOTS = 3
"""A request of a recurrent model has so many states."""


class Recurrent:
    """An engine that lets requests in as SGLang does, with a pool of states and one of tokens."""

    chunked_req = last_batch = None
    chunked_prefill_size = 2048
    new_token_ratio_tracker = NS(current=1.0)

    def __init__(self, ledger: Ledger, requests: int) -> None:
        self.group = Group(ledger, 1, 400, PAGE * 9 // 4, window_bytes=PAGE * 3, decay_s=0.0)
        self.waiting_queue = [self._request() for _ in range(requests)]
        self.running_batch = NS(reqs=[])
        self.most_running = 0

    def _request(self) -> NS:
        return NS(
            origin_input_ids=[1] * 48,
            output_ids=[],
            sampling_params=NS(max_new_tokens=48, ignore_eos=True),
            kv_committed_len=0,
            blocks=[],
            slots=[],
        )

    def step(self) -> None:
        """A pass, and a token for each request that runs."""
        states, tokens = self.group.ranks[0]
        running = self.running_batch.reqs
        kinds = [States(SLOTS, states.num_live - 1), TokenBlocks(16)]
        self.group.plan(load_of(self, [], 16, kinds))
        room = self.group.order.room(1)
        while self.waiting_queue:
            request = self.waiting_queue[0]
            length = len(request.origin_input_ids) + len(request.output_ids)
            to_come = sum(48 - len(r.output_ids) for r in [request, *running])
            free = 16 * (tokens.num_clean + room.reachable_blocks - room.withheld_blocks)
            if states.num_clean < SLOTS or length + to_come + 16 > free:
                break
            needed = -(-length // 16)
            if tokens.num_clean < needed:
                break
            running.append(self.waiting_queue.pop(0))
            request.slots = states.allocate(SLOTS)
            request.blocks = tokens.allocate(needed)
            request.kv_committed_len = length
        for request in list(running):
            if request.kv_committed_len == 16 * len(request.blocks):
                if not tokens.num_clean:
                    last = running.pop()
                    self._free(last)
                    self.waiting_queue.insert(0, last)
                    break
                request.blocks += tokens.allocate(1)
            request.kv_committed_len += 1
            request.output_ids.append(1)
            if len(request.output_ids) == 48:
                running.remove(request)
                self._free(request)
        self.most_running = max(self.most_running, len(running))

    def _free(self, request: NS) -> None:
        states, tokens = self.group.ranks[0]
        states.free(request.slots)
        tokens.free(request.blocks)


@pytest.mark.parametrize("requests", [1, 2, 6, 20])
def test_however_many_come_at_once_all_are_served(tmp_path: Path, requests: int) -> None:
    """One pool must not take for all of them what another lacks for the first."""
    states, tokens = SLOTS * 9 / 4, (48 + 48 + 2 * 16) // 16 * 3
    for fit in (1.2, 1.5, 2, 3, 10):
        # Its null blocks' pages, and so many requests with all that is to come.
        capacity = round((6 + fit * (states + tokens)) * PAGE)
        engine = Recurrent(Ledger(str(tmp_path / f"{fit}.ledger"), capacity), requests)
        for _ in range(49 * requests + 10):
            engine.step()
            if not engine.waiting_queue and not engine.running_batch.reqs:
                break
        assert not engine.waiting_queue and not engine.running_batch.reqs, fit
        assert engine.most_running >= min(requests, int(fit)), fit
