# SPDX-License-Identifier: Apache-2.0
"""What an engine gives back, in which order, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcached_core import Ledger
from kvcached_core.holding import Holding
from tests.support.block_pool import PAGE, Block, Engine


@dataclass
class Request:
    """An engine's request, as far as demand is sized by it."""

    num_tokens: int
    num_computed_tokens: int = 0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    yield Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)


def another(ledger: Ledger) -> Ledger:
    return Ledger(ledger.path, ledger.capacity, ledger.headroom)


def test_whole_pages_empty_first(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE // 4, parked_bytes=100 * PAGE)
    first = engine.take(3)  # shares its page with the null block
    pages = [engine.take(4) for _ in range(5)]
    assert first is not None and all(pages)
    live = pages[2][:1]
    oldest_first = [pages[2][1:], pages[0], pages[4], pages[1], pages[3]]
    for blocks in oldest_first:
        engine.free(blocks, cached=True)
    engine.queue.empty_pages(2)
    # The oldest blocks share their page with a live one: dropping them would free nothing.
    assert engine.evicted == [b.block_id for b in [*pages[0], *pages[4]]]
    assert engine.scheduler.allocator.parked_pages == 2
    engine.queue.empty_pages(10)
    assert engine.scheduler.allocator.parked_pages == 4
    assert engine.queue.num_cached == 3
    engine.free(live)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(100)), cached=st.integers(0, 100), pages=st.integers(1, 30))
def test_what_goes_is_as_if_all_of_the_cache_were_looked_at(
    ledger: Ledger, order: list[int], cached: int, pages: int
) -> None:
    engine = Engine(another(ledger), 101, PAGE // 4, parked_bytes=100 * PAGE)
    try:
        held = engine.take(100)
        assert held is not None
        engine.free([held[i] for i in order[:cached]], cached=True)
        allocator = engine.scheduler.allocator
        ids = [held[i].block_id for i in order[:cached]]
        expected = allocator.emptied_by(ids, pages)
        engine.queue.empty_pages(pages)
        assert set(engine.evicted) == set(expected)
        assert engine.queue.num_cached == cached - len(expected)
    finally:
        engine.scheduler.close()


class Looked(Block):
    """A block that notes when somebody looks which one it is."""

    times = 0

    @property
    def block_id(self) -> int:
        Looked.times += 1
        return int(self.__dict__["block_id"])


def test_a_small_ask_looks_at_little_of_a_large_cache(ledger: Ledger) -> None:
    engine = Engine(ledger, 241, PAGE // 4, parked_bytes=100 * PAGE)
    held = engine.take(240)
    assert held is not None
    engine.free(held, cached=True)
    for block in held:
        block.__class__ = Looked
    Looked.times = 0
    engine.queue.empty_pages(2)
    assert engine.scheduler.allocator.parked_pages == 2
    assert Looked.times < 60


def test_the_cache_keeps_to_its_bound(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, join={"cache_limit": 10 * PAGE}, parked_bytes=100 * PAGE)
    held = engine.take(30)
    assert held is not None
    engine.free(held, cached=True)
    engine.apply()
    assert engine.queue.num_cached == 10
    assert engine.evicted == [b.block_id for b in held[:20]]
    assert engine.scheduler.counters["cache_evictions"] == 20


def test_no_more_of_the_cache_goes_than_must_if_blocks_straddle_pages(ledger: Ledger) -> None:
    block_bytes = PAGE * 3 // 8
    engine = Engine(
        ledger, 400, block_bytes, join={"cache_limit": 10 * PAGE}, parked_bytes=100 * PAGE
    )
    held = engine.take(90)
    assert held is not None
    engine.free(held, cached=True)
    engine.apply()
    bound = 10 * PAGE // block_bytes
    assert bound - 4 < engine.queue.num_cached <= bound


def test_a_bound_that_is_lowered_wakes_an_idle_engine_and_is_acknowledged(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, decay_s=1000)
    held = engine.take(30)
    assert held is not None
    engine.free(held, cached=True)
    engine.apply()
    member = engine.accounts[0].member
    assert not engine.scheduler.wants_step()
    operator = another(ledger)
    version = operator.set_policy(member.slot, member.generation, cache_limit=4 * PAGE)
    assert engine.scheduler.attend()
    assert operator.members()[0].observed_version < version
    engine.apply()
    engine.scheduler.attend()
    assert engine.queue.num_cached == 4
    assert operator.members()[0].observed_version == version


def test_a_limit_that_is_lowered_shrinks_an_idle_engine(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    held = engine.take(40)
    assert held is not None
    engine.free(held, cached=True)
    engine.apply()
    member = engine.accounts[0].member
    operator = another(ledger)
    version = operator.set_policy(member.slot, member.generation, limit=10 * PAGE)
    assert engine.scheduler.attend()
    engine.apply()
    assert ledger.total_leased() == 10 * PAGE
    engine.apply()
    engine.scheduler.attend()
    assert operator.members()[0].observed_version == version
    assert not engine.scheduler.wants_step()
    assert engine.take(20) is None
    assert engine.take(9) is not None


def test_a_limit_below_what_runs_preempts_from_the_end(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, holding=Holding(16))
    running = [engine.take(8) for _ in range(5)]
    assert all(running)
    requests = [Request(128, 128) for _ in running]
    engine.apply(requests)
    assert engine.preempt == 0
    member = engine.accounts[0].member
    another(ledger).set_policy(member.slot, member.generation, limit=21 * PAGE)
    assert engine.scheduler.begin_pass(requests) == 3  # 41 pages held, 20 too many
    for blocks in running[2:]:
        assert blocks is not None
        engine.free(blocks)
    engine.finish()
    assert ledger.total_leased() <= 21 * PAGE
    assert engine.scheduler.counters["preemptions"] == 3


@pytest.mark.parametrize(("with_cache", "left"), [(False, 21), (True, 1)])
def test_an_operator_gets_back_what_is_unused(ledger: Ledger, with_cache: bool, left: int) -> None:
    engine = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    parked, cached = engine.take(10), engine.take(20)
    assert parked is not None and cached is not None
    engine.free(parked)
    engine.free(cached, cached=True)
    engine.apply()
    member = engine.accounts[0].member
    operator = another(ledger)
    operator.trim(member.slot, member.generation, cached=with_cache)
    assert operator.members()[0].trim_pending
    assert engine.scheduler.attend()
    engine.apply()
    assert ledger.total_leased() == left * PAGE
    engine.apply()
    engine.scheduler.attend()
    assert not operator.members()[0].trim_pending
    assert not engine.scheduler.wants_step()


def test_a_trim_is_not_acknowledged_before_its_pass_is_over(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    held = engine.take(30)
    assert held is not None
    engine.free(held)
    engine.apply()
    member = engine.accounts[0].member
    another(ledger).trim(member.slot, member.generation)
    engine.scheduler.begin_pass()
    engine.scheduler.attend()  # the watcher's thread may look at any time
    assert member.info().trim_pending
    assert engine.scheduler.take_ops().decommit
    engine.scheduler.attend()
    assert member.info().trim_pending  # decided, and the workers have not done it
    engine.apply()
    engine.apply()
    engine.scheduler.attend()
    assert not member.info().trim_pending
    assert ledger.total_leased() == PAGE


def test_the_null_block_is_not_asked_for(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    member = engine.accounts[0].member
    assert member.info().pinned == PAGE
    starved = another(ledger).join("starved", priority=100)
    starved.set_demand(ledger.capacity)
    engine.apply()
    assert member.ask() == (0, 0)
    assert not engine.scheduler.wants_step()


def test_a_trim_of_some_bytes_stops_there(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    held = engine.take(30)
    assert held is not None
    engine.free(held)
    engine.apply()
    member = engine.accounts[0].member
    another(ledger).trim(member.slot, member.generation, 5 * PAGE)
    engine.apply()
    engine.apply()
    assert ledger.total_leased() == 26 * PAGE


def test_demand_covers_all_that_wait(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, holding=Holding(16))
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(60 * PAGE)
    waiting = [Request(160), Request(320), Request(80)]
    engine.scheduler.begin_pass((), waiting)
    assert engine.take(10) is None
    engine.finish()
    # 10 blocks asked and 3 there, so 7 are missing for the first; 20 and 5 for those behind.
    assert engine.accounts[0].member.info().demand == (7 + 20 + 5) * PAGE
    assert engine.accounts[0].member.info().waiting == 3
    assert neighbour.ask() == (0, 0)  # it holds nothing it could spare
    # A pass that is full without a look at the queue does not take the demand back.
    engine.apply((), waiting)
    assert engine.accounts[0].member.info().demand == (7 + 20 + 5) * PAGE
    # What has left it is not waited for.
    engine.scheduler.begin_pass((), waiting[2:])
    engine.finish()
    assert engine.accounts[0].member.info().demand == 5 * PAGE
    assert engine.accounts[0].member.info().waiting == 1
    neighbour.release(60 * PAGE)
    engine.scheduler.begin_pass()
    assert engine.take(10) is not None
    engine.finish()
    assert engine.accounts[0].member.info().demand == 0
    assert engine.accounts[0].member.info().histograms["wait"].count == 1


@pytest.mark.parametrize("free", [0, 5, 15, 25, 35])
def test_a_large_request_gets_what_it_lacks_and_what_is_free(ledger: Ledger, free: int) -> None:
    idle = Engine(ledger, 400, PAGE, decay_s=1000)
    held = idle.take(62 - free)
    assert held is not None
    idle.free(held, cached=True)
    idle.apply()
    engine = Engine(another(ledger), 400, PAGE, name="needy")
    for _ in range(10):
        engine.scheduler.begin_pass()
        # As the engine asks before it admits a request: all of it, or nothing is taken.
        if not engine.queue.lacks(40):
            break
        engine.finish()
        idle.apply()
    assert engine.take(40) is not None


def test_what_runs_keeps_its_next_blocks(ledger: Ledger) -> None:
    busy = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000, holding=Holding(16))
    running, unused = busy.take(20), busy.take(20)
    assert running is not None and unused is not None
    busy.free(unused)
    requests = [Request(161, 160), Request(160, 160)]
    busy.apply(requests)
    other = Engine(another(ledger), 400, PAGE, name="other")
    assert other.take(60) is None
    busy.scheduler.begin_pass(requests)
    # 20 are parked here; of two requests one begins its 11th block, and so does the other.
    assert busy.scheduler.allocator.parked_pages == 2
    assert busy.take(2) is not None
    busy.finish()


def test_nothing_given_back_is_taken_again_in_the_same_pass(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    held = engine.take(40)
    assert held is not None
    engine.free(held)
    engine.apply()
    other = Engine(another(ledger), 400, PAGE, name="other")
    assert other.take(50) is None
    engine.scheduler.begin_pass()
    assert engine.scheduler.growable_blocks() == 0
    assert engine.scheduler.grow(5) == 0
    ops = engine.scheduler.take_ops()
    assert ops.commit == [] and sum(b - a for a, b in ops.decommit) >= 27


def test_a_starving_engine_is_woken_by_a_release(ledger: Ledger) -> None:
    engine = Engine(ledger, 400, PAGE)
    neighbour = another(ledger).join("neighbour")
    assert neighbour.lease(63 * PAGE)
    engine.scheduler.begin_pass()
    assert engine.take(10) is None
    bell = engine.scheduler.accounts.bell()
    engine.finish()
    neighbour.release(63 * PAGE)
    begin = time.monotonic()
    bell.wait(10_000)
    assert time.monotonic() - begin < 5


def test_what_has_come_is_not_asked_for_again(ledger: Ledger) -> None:
    """Though the pass that took it goes on: with a long prompt for tens of milliseconds."""
    alice = Engine(ledger, 1000, PAGE, parked_bytes=64 * PAGE, decay_s=1000)
    bob = Engine(another(ledger), 1000, PAGE, name="bob")
    held = alice.take(60)
    assert held is not None
    alice.free(held)
    alice.apply()
    bob.scheduler.begin_pass([], [Request(20)])
    assert bob.take(20) is None
    bob.finish()
    assert alice.apply()[1] == 18  # what was missing beside what is free
    bob.scheduler.begin_pass([], [Request(20)])
    assert bob.take(20) is not None
    assert ledger.total_demand() == 0
    assert alice.apply()[1] == 0
    bob.finish()
    assert alice.apply()[1] == 0


def test_who_waits_behind_is_still_asked_for(ledger: Ledger) -> None:
    alice = Engine(ledger, 1000, PAGE, parked_bytes=64 * PAGE, decay_s=1000)
    bob = Engine(another(ledger), 1000, PAGE, name="bob", holding=Holding(1))
    held = alice.take(60)
    assert held is not None
    alice.free(held)
    alice.apply()
    waiting = [Request(20), Request(10)]
    bob.scheduler.begin_pass([], waiting)
    assert bob.take(20) is None
    bob.finish()
    assert ledger.total_demand() == (18 + 10) * PAGE  # two were free, and are bob's
    alice.apply()
    bob.scheduler.begin_pass([], waiting)
    assert bob.take(20) is not None
    assert ledger.total_demand() == 10 * PAGE


def test_a_starting_engine_waits_for_its_first_page(ledger: Ledger) -> None:
    idle = Engine(ledger, 400, PAGE, parked_bytes=100 * PAGE, decay_s=1000)
    held = idle.take(63)
    assert held is not None
    idle.free(held, cached=True)
    idle.apply()

    def wake() -> None:
        idle.apply()

    idle.scheduler.watch(wake)
    try:
        Engine(another(ledger), 400, PAGE, name="late", start_wait_s=20)
    finally:
        idle.scheduler.close()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("engines", [2, 3])
def test_two_that_both_want_more_than_half_do_not_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, engines: int
) -> None:
    """They hold equal parts, unused, and hear of each other's need before either gives any."""
    now = 100.0
    for module in ("scheduler", "demand"):
        monkeypatch.setattr(f"kvcached_core.{module}.time.monotonic", lambda: now)
    monkeypatch.setattr("kvcached_core.scheduler._STARVED_PAUSE_MS", 0)
    each, wanted = 15, 18 if engines == 2 else 33
    path = str(tmp_path / "host-0.ledger")
    capacity = each * engines * PAGE
    # What is unused stays, as it would while passes try to use it.
    all_ = [
        Engine(Ledger(path, capacity, 0), 1000, PAGE, name=f"e{i}", decay_s=1e9)
        for i in range(engines)
    ]
    for engine in all_:
        held = engine.take(each - 1)
        assert held is not None
        engine.apply()
        engine.free(held, cached=cached)
        engine.apply()
    waiting = list(all_)
    running: dict[int, tuple[list[Any], int]] = {}
    for step in range(1500):
        for engine in all_:
            engine.scheduler.begin_pass((), [Request(wanted)] if engine in waiting else ())
        ran = []
        for index, engine in enumerate(all_):
            if index in running and step >= running[index][1]:
                engine.free(running.pop(index)[0], cached=cached)
            elif engine in waiting and not engine.queue.lacks(wanted):
                blocks = engine.take(wanted)
                assert blocks is not None
                waiting.remove(engine)
                running[index] = blocks, step + 20
            ran.append(index in running)
        for engine, runs in zip(all_, ran, strict=True):
            engine.scheduler.take_ops(int(runs))
            pages = engine.scheduler.allocator.committed_pages(0)
            member = engine.accounts[0].member
            member.release(member.info().leased - pages * PAGE)
        now += 0.01
        if not waiting and not running:
            # A second for each that gives way, and what they run.
            assert step < 100 * (2 * engines) + 30 * engines
            return
    pytest.fail("they stand still for ever")
