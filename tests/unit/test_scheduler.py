# SPDX-License-Identifier: Apache-2.0
"""The scheduler half and its free queue, against real ledgers and a plain model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import ArenaShape, ElasticScheduler, Ledger
from kvcached_core.accounts import Account
from tests.support.block_pool import PAGE, Block, Engine


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    yield Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)


def another(ledger: Ledger) -> Ledger:
    return Ledger(ledger.path, ledger.capacity, ledger.headroom)


def test_without_pressure_blocks_come_as_from_a_plain_queue() -> None:
    engine = Engine(None, 64, PAGE)
    taken = engine.take(5)
    assert taken is not None and [b.block_id for b in taken] == [1, 2, 3, 4, 5]
    engine.free([taken[4], taken[3]])
    engine.free(taken[:3], cached=True)
    order = [b.block_id for b in engine.queue.get_all_free_blocks()]
    assert order == [5, 4, *range(6, 64), 1, 2, 3]


def test_a_block_is_leased_before_it_is_handed_out(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE)
    assert ledger.total_leased() == PAGE  # the null block's page
    assert engine.take(10) is not None
    assert ledger.total_leased() == 11 * PAGE
    ops = engine.scheduler.take_ops()
    assert ops.commit == [(1, 11)] and ops.decommit == []


def test_running_out_is_an_answer_and_loses_nothing(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE)
    held = engine.take(40)
    assert held is not None
    assert engine.take(30) is None
    rest = engine.take(23)
    assert rest is not None
    assert engine.take(1) is None
    assert ledger.total_leased() == ledger.capacity
    engine.free(held)
    assert engine.take(40) is not None


def test_free_blocks_count_what_the_ledger_can_back(ledger: Ledger) -> None:
    first, second = Engine(ledger, 1000, PAGE), Engine(another(ledger), 1000, PAGE)
    assert first.queue.num_free_blocks == 62
    assert second.take(20) is not None
    assert first.queue.num_free_blocks == 42
    assert first.queue.usage() == 0.0
    assert first.take(42) is not None
    assert first.queue.num_free_blocks == 0
    assert first.queue.usage() == 1.0
    assert first.queue.num_used_blocks == 43


def test_blocks_that_are_there_cost_no_look_at_the_ledger(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine asks for every running request in every pass."""
    engine = Engine(ledger, 1000, PAGE)
    held = engine.take(10)
    assert held is not None
    engine.free(held)
    looks = []
    ask = engine.scheduler.growable_blocks

    def counted(**how: object) -> int:
        looks.append(how)
        return ask()

    monkeypatch.setattr(engine.scheduler, "growable_blocks", counted)
    for wanted in (0, 1, 10):
        assert not engine.queue.lacks(wanted)
        assert engine.queue.ensure(wanted)
    assert looks == []
    assert not engine.queue.lacks(63) and len(looks) == 1
    assert engine.queue.lacks(64) and ledger.total_demand() == 54 * PAGE


def test_cached_blocks_are_evicted_only_when_nothing_can_be_committed(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE)
    held = engine.take(50)
    assert held is not None
    engine.free(held, cached=True)
    assert engine.take(13) is not None and engine.evicted == []
    assert engine.take(2) is not None and engine.evicted == [1, 2]


def test_prefix_hits_need_no_memory(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE)
    held = engine.take(63)
    assert held is not None
    engine.free(held, cached=True)
    assert engine.queue.ensure(63, [held])
    assert not engine.queue.ensure(64, [held])
    assert engine.evicted == []


def test_a_shortage_is_posted_and_withdrawn(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE)
    engine.scheduler.note_shortage(3)
    assert ledger.total_demand() == 3 * PAGE
    assert engine.take(100) is None
    assert ledger.total_demand() > 3 * PAGE
    engine.apply()
    engine.apply()
    assert ledger.total_demand() == 0


def test_an_idle_engine_gives_parked_then_cached_pages_on_demand(ledger: Ledger) -> None:
    idle = Engine(ledger, 1000, PAGE, parked_bytes=8 * PAGE, decay_s=1000)
    busy = Engine(another(ledger), 1000, PAGE)
    parked, cached = idle.take(20), idle.take(30)
    assert parked is not None and cached is not None
    idle.free(parked)
    idle.free(cached, cached=True)
    idle.apply()
    assert not idle.scheduler.wants_step()

    assert busy.take(30) is None
    assert idle.scheduler.wants_step()
    idle.apply()
    assert idle.evicted == []
    assert busy.take(30) is not None

    assert busy.take(20) is None
    assert idle.scheduler.wants_step()
    idle.apply()
    assert 0 < len(idle.evicted) <= 20
    assert busy.take(20) is not None
    busy.apply()  # closes the pass that was short
    busy.apply()
    idle.apply()  # reports what was released
    assert not idle.scheduler.wants_step()


def test_idle_pages_beyond_the_allowance_go_back_after_the_decay(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("kvcached_core.scheduler.time.monotonic", lambda: now)
    engine = Engine(ledger, 1000, PAGE, parked_bytes=4 * PAGE, decay_s=2.0)
    held = engine.take(40)
    assert held is not None
    engine.apply()
    engine.free(held)
    engine.apply()
    now += 2.1  # the period in which the pages were still in use ends
    assert engine.scheduler.wants_step()
    engine.apply()
    now += 2.1
    assert engine.scheduler.wants_step()
    engine.apply()
    assert ledger.total_leased() == 5 * PAGE
    assert engine.scheduler.wants_step()  # one more, to report what was released
    engine.apply()
    now += 10
    assert not engine.scheduler.wants_step()


def test_commit_ahead_leaves_the_last_bytes_to_others(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE, ahead_bytes=4 * PAGE, parked_bytes=4 * PAGE)
    assert engine.take(3) is not None
    ops = engine.scheduler.take_ops()
    assert ops.commit == [(1, 4)] and ops.commit_ahead == [(4, 8)]
    assert engine.take(4) is not None  # ready: no commit in this step
    assert engine.scheduler.take_ops().commit == []
    assert engine.take(45) is not None
    assert engine.scheduler.take_ops().commit_ahead == []


def test_a_reset_cache_becomes_clean_memory(ledger: Ledger) -> None:
    engine = Engine(ledger, 1000, PAGE, parked_bytes=1000 * PAGE)
    held = engine.take(10)
    assert held is not None
    engine.free(held, cached=True)
    for block in engine.blocks:
        block.block_hash = None
    engine.apply()
    assert engine.queue.num_cached == 0
    assert engine.scheduler.allocator.num_clean == 10


@pytest.mark.parametrize("block_bytes", [PAGE // 4, PAGE, PAGE * 9 // 8, PAGE // 3 + 16])
def test_two_engines_at_random_never_exceed_the_ledger(ledger: Ledger, block_bytes: int) -> None:
    rng = random.Random(block_bytes)
    engines = [
        Engine(ledger, 400, block_bytes, parked_bytes=2 * PAGE, ahead_bytes=2 * PAGE),
        Engine(another(ledger), 400, block_bytes, parked_bytes=2 * PAGE),
    ]
    held: list[list[list[Block]]] = [[], []]
    refused = 0
    for _ in range(3000):
        which = rng.randrange(2)
        engine = engines[which]
        action = rng.random()
        if action < 0.5:
            taken = engine.take(rng.randint(1, 24))
            refused += taken is None
            if taken is not None:
                held[which].append(taken)
        elif action < 0.8 and held[which]:
            engine.free(held[which].pop(rng.randrange(len(held[which]))), rng.random() < 0.5)
        else:
            engine.apply()
        assert ledger.total_leased() <= ledger.capacity
        for other, mine in zip(engines, held, strict=True):
            ids = [b.block_id for taken in mine for b in taken]
            assert len(ids) == len(set(ids)) and 0 not in ids
            committed = other.scheduler.allocator.committed_pages(0) * PAGE
            assert committed <= other.accounts[0].member.info().leased
            assert other.queue.num_used_blocks == len(ids) + 1
    assert refused > 20


def test_two_ranks_on_one_ledger_are_leased_together(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    member = ledger.join("tp2")
    shape = ArenaShape(1000, PAGE, PAGE)
    account = Account(ledger, member, (2 * PAGE,), 2 * PAGE)
    scheduler = ElasticScheduler(1000, [shape], [account])
    assert scheduler.growable_blocks() == 31
    assert scheduler.grow(31) == 31
    assert ledger.total_leased() == ledger.capacity


def test_one_full_device_refuses_the_block_on_all(tmp_path: Path) -> None:
    ledgers = [Ledger(str(tmp_path / f"gpu-{i}.ledger"), 16 * PAGE) for i in range(2)]
    accounts = [Account(x, x.join("tp2"), (PAGE,), PAGE) for x in ledgers]
    other = another(ledgers[1]).join("neighbour")
    assert other.lease(10 * PAGE)
    scheduler = ElasticScheduler(1000, [ArenaShape(1000, PAGE, PAGE)], accounts)
    assert scheduler.growable_blocks() == 5
    assert scheduler.grow(9) == 5
    assert ledgers[0].total_leased() == 6 * PAGE


def test_pipeline_ranks_of_different_size_are_charged_by_their_own_pages(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    shapes = [ArenaShape(1000, PAGE, PAGE), ArenaShape(1000, PAGE // 4, PAGE)]
    account = Account(ledger, ledger.join("pp2"), (PAGE, PAGE), PAGE + PAGE // 4)
    scheduler = ElasticScheduler(1000, shapes, [account])
    assert ledger.total_leased() == 2 * PAGE
    scheduler.grow(7)  # blocks 1..7: seven pages here, one more there (blocks 4..7)
    assert ledger.total_leased() == (8 + 2) * PAGE


def test_no_memory_for_the_null_block_is_told(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 4 * PAGE)
    neighbour = ledger.join("neighbour")
    assert neighbour.lease(4 * PAGE)
    with pytest.raises(MemoryError, match="null block"):
        Engine(ledger, 100, PAGE)
