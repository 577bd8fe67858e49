# SPDX-License-Identifier: Apache-2.0
"""While nobody wants anything a pass costs next to nothing, and news end that at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_core import Ledger
from kvcached_core.plan import StepOps
from tests.support.block_pool import PAGE, Engine


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    yield Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)


@pytest.fixture
def engine(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """One whose quiet does not end by itself."""
    monkeypatch.setattr("kvcached_core.scheduler._LOOK_S", 3600.0)
    return Engine(ledger, 1000, PAGE, parked_bytes=64 * PAGE, decay_s=1000)


def looks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which looks at the ledger are taken from now on, each of which takes its lock."""
    seen: list[str] = []

    def noting(name: str, look: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object) -> object:
            seen.append(name)
            return look(*args)

        return noted

    for owner, name in (
        (engine.scheduler.accounts, "others_wait"),
        (engine.scheduler._orders, "begin"),
        (engine.scheduler._orders, "cache_limits"),
        (engine.scheduler, "growable_blocks"),
        (engine.scheduler, "_bytes_asked"),
        (engine.scheduler.pools, "all_returning"),
        (engine.scheduler._stats, "read"),
    ):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    return seen


def a_pass(engine: Engine) -> None:
    engine.scheduler.begin_pass()
    engine.scheduler.take_ops(1)


def test_a_quiet_pass_looks_at_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.take(5) is not None
    a_pass(engine)
    a_pass(engine)
    engine.scheduler.stats()
    seen = looks(engine, monkeypatch)
    for _ in range(3):
        a_pass(engine)
        assert engine.scheduler.stats() is None
        assert 0 < engine.queue.usage() < 1
        assert not engine.scheduler.attend()
    assert seen == []


def test_what_a_quiet_pass_takes_is_backed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    a_pass(engine)
    a_pass(engine)
    seen = looks(engine, monkeypatch)
    engine.scheduler.begin_pass()
    held = engine.take(5)
    assert held is not None
    ops = engine.scheduler.take_ops(5)
    backed = {block for start, end in ops.commit for block in range(start, end)}
    assert backed == {block.block_id for block in held}
    engine.scheduler.begin_pass()
    assert engine.scheduler.take_ops(5) == StepOps([], [], [])
    # In the same pass one request ends and another takes as many blocks.
    engine.scheduler.begin_pass()
    engine.free(held)
    again = engine.take(5)
    assert again is not None and {b.block_id for b in again} == backed
    assert engine.scheduler.take_ops(5) == StepOps([], [], [])
    assert "begin" not in seen and "_bytes_asked" not in seen


def test_what_went_in_between_is_backed_anew(ledger: Ledger, engine: Engine) -> None:
    """Even if there are then as many blocks as when a quiet pass last looked."""
    held = engine.take(10)
    assert held is not None
    a_pass(engine)
    engine.free(held)
    a_pass(engine)
    member = ledger.members()[0]
    ledger.trim(member.slot, member.generation, 10 * PAGE, False)
    engine.apply()
    engine.apply()
    engine.scheduler.attend()
    assert ledger.total_leased() == PAGE
    engine.scheduler.begin_pass()
    assert engine.scheduler._quiet
    again = engine.take(10)
    assert again is not None
    engine.free(again)
    assert engine.scheduler.take_ops(1).commit == [(1, 11)]


def test_a_shortage_in_a_quiet_pass_is_posted(ledger: Ledger, engine: Engine) -> None:
    assert engine.take(60) is not None
    a_pass(engine)
    engine.scheduler.begin_pass()
    assert engine.take(10) is None
    engine.scheduler.take_ops(60)
    assert ledger.total_demand() > 0
    for _ in range(3):
        a_pass(engine)
    assert ledger.total_demand() == 0


def test_unused_pages_go_back_in_time(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcached_core.scheduler._LOOK_S", 3600.0)
    engine = Engine(ledger, 1000, PAGE, decay_s=0.0)
    held = engine.take(10)
    assert held is not None
    a_pass(engine)
    engine.free(held)
    gone = 0
    for _ in range(3):
        engine.scheduler.begin_pass()
        gone += sum(end - start for start, end in engine.scheduler.take_ops(1).decommit)
    assert gone == 10


def test_it_looks_again_after_a_while(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(ledger, 1000, PAGE)
    monkeypatch.setattr("kvcached_core.scheduler._LOOK_S", 0.0)
    seen = looks(engine, monkeypatch)
    a_pass(engine)
    a_pass(engine)
    assert seen.count("_bytes_asked") == 2


def test_who_waits_is_seen_in_the_next_pass(ledger: Ledger, engine: Engine) -> None:
    busy = Engine(ledger, 1000, PAGE, name="busy")
    held = engine.take(62)
    assert held is not None
    engine.free(held)
    a_pass(engine)
    busy.scheduler.begin_pass()
    assert not busy.queue.ensure(20)
    engine.scheduler.begin_pass()
    assert engine.scheduler.contended
    assert sum(end - start for start, end in engine.scheduler.take_ops(1).decommit) >= 20


def test_a_trim_and_a_limit_are_seen_in_the_next_pass(ledger: Ledger, engine: Engine) -> None:
    held = engine.take(40)
    assert held is not None
    engine.free(held)
    a_pass(engine)
    member = ledger.members()[0]
    ledger.trim(member.slot, member.generation, 10 * PAGE, False)
    engine.scheduler.begin_pass()
    assert sum(end - start for start, end in engine.scheduler.take_ops(1).decommit) == 10
    engine.apply()
    engine.scheduler.attend()
    a_pass(engine)
    ledger.set_policy(member.slot, member.generation, limit=8 * PAGE)
    engine.scheduler.begin_pass()
    assert sum(end - start for start, end in engine.scheduler.take_ops(1).decommit) > 0


def test_what_parks_is_told_in_a_quiet_pass(ledger: Ledger, engine: Engine) -> None:
    held = engine.take(10)
    assert held is not None
    a_pass(engine)
    engine.free(held)
    a_pass(engine)
    assert ledger.members()[0].parked == 10 * PAGE
    assert engine.take(4) is not None
    a_pass(engine)
    assert ledger.members()[0].parked == 6 * PAGE


def test_what_is_cached_is_told_in_a_quiet_pass(ledger: Ledger, engine: Engine) -> None:
    """Its blocks stay as live as they were, and there may be no further pass for long."""
    held = engine.take(10)
    assert held is not None
    a_pass(engine)
    a_pass(engine)
    engine.free(held, cached=True)
    engine.scheduler.begin_pass()
    assert engine.scheduler.quiet
    engine.scheduler.take_ops(1)
    assert ledger.members()[0].cached == 10 * PAGE


def test_metrics_are_told_when_the_last_request_has_ended(engine: Engine) -> None:
    a_pass(engine)
    assert engine.scheduler.stats() is not None
    assert engine.scheduler.stats() is None
    engine.scheduler.begin_pass()
    engine.scheduler.take_ops(0)
    assert engine.scheduler.stats() is not None


def leases(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each lease from now on was granted."""
    granted: list[bool] = []
    accounts = engine.scheduler.pools[0].accounts
    lease = accounts.lease_bytes

    def noting(*args: object) -> bool:
        granted.append(lease(*args))  # type: ignore[arg-type]
        return granted[-1]

    monkeypatch.setattr(accounts, "lease_bytes", noting)
    return granted


def test_a_full_cache_is_taken_from_without_a_lease_for_each_block(
    ledger: Ledger, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is free, so that growing fails; that is found out once a pass."""
    held = engine.take(63)
    assert held is not None
    engine.free(held, cached=True)
    a_pass(engine)
    granted = leases(engine, monkeypatch)
    for number in range(2):
        engine.scheduler.begin_pass()
        assert not any(engine.take(1) is None for _ in range(8))
        assert engine.scheduler.take_ops(8).commit == []
        assert granted == [False] * (number + 1)
    assert len(engine.evicted) == 16


def test_memory_that_is_free_again_spares_the_cache(ledger: Ledger, engine: Engine) -> None:
    busy = Engine(ledger, 1000, PAGE, name="busy")
    held, other = engine.take(40), busy.take(22)
    assert held is not None and other is not None
    engine.free(held, cached=True)
    engine.scheduler.begin_pass()
    assert engine.take(4) is not None and len(engine.evicted) == 4
    engine.scheduler.take_ops(4)
    busy.free(other)
    busy.scheduler.give_all()
    busy.apply()
    engine.scheduler.begin_pass()
    assert engine.take(4) is not None and len(engine.evicted) == 4


def test_who_has_nothing_cached_asks_again(ledger: Ledger, engine: Engine) -> None:
    """In the same pass, as before its engine preempts a request."""
    busy = Engine(ledger, 1000, PAGE, name="busy")
    other = busy.take(22)
    assert engine.take(40) is not None and other is not None
    engine.scheduler.begin_pass()
    assert engine.take(4) is None
    busy.free(other)
    busy.scheduler.give_all()
    busy.apply()
    assert engine.take(4) is not None
