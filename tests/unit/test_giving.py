# SPDX-License-Identifier: Apache-2.0
"""What an engine owes others, and the notes by which other ranks do the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core import Ledger, Member, giving
from tests.support.block_pool import PAGE, Engine


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """With a block a page, and none given up for being unused."""
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    return Engine(ledger, 64, PAGE, parked_bytes=64 * PAGE)


def test_what_is_not_there_yet_is_given_by_the_end_of_the_pass(engine: Engine) -> None:
    held, giving = engine.take(6), engine.scheduler.giving
    assert held is not None
    engine.free(held[:2])
    giving.owe(4 * PAGE, of_caches=0)
    assert engine.scheduler.counters["decommitted_pages"] == 2
    engine.free(held[2:])  # requests that were preempted
    giving.settle()
    giving.settle()
    assert engine.scheduler.counters["decommitted_pages"] == 4, "and no more than that"
    (account,) = engine.accounts
    assert account.member.info().counters["reclaimed_bytes"] == 4 * PAGE


def test_what_a_pass_owed_is_forgotten_with_the_next(engine: Engine) -> None:
    held = engine.take(6)
    assert held is not None
    engine.scheduler.giving.owe(4 * PAGE, of_caches=0)
    engine.scheduler.giving.owe(0, of_caches=0)
    engine.free(held)
    engine.scheduler.giving.settle()
    assert engine.scheduler.counters["decommitted_pages"] == 0


def test_caches_give_only_what_may_be_had_of_them(engine: Engine) -> None:
    held = engine.take(6)
    assert held is not None
    engine.free(held, cached=True)
    engine.scheduler.giving.owe(4 * PAGE, of_caches=PAGE)
    assert (engine.queue.num_cached, engine.scheduler.counters["decommitted_pages"]) == (5, 1)


@pytest.fixture
def another(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Member:
    """Waits for 30 of the 40 pages that the engine keeps as prefix cache."""
    monkeypatch.setattr(giving, "_FIRST_PART", 4 * PAGE)
    engine.scheduler.giving.owe(0, 0)  # so that it begins with that
    held = engine.take(40)
    assert held is not None
    engine.free(held, cached=True)
    engine.apply()
    (account,) = engine.accounts
    member = account.ledger.join("another")
    member.set_demand((64 - 41 + 30) * PAGE, 1)
    return member


def _given(engine: Engine, running: list[Any]) -> list[int]:
    """Pages given up pass by pass, of which no worker has released any yet."""
    pages = []
    while not pages or pages[-1]:
        engine.scheduler.begin_pass(running)
        pages.append(sum(b - a for a, b in engine.scheduler.take_ops(0).decommit))
        assert len(pages) < 20
    return pages


def test_an_idle_engine_gives_a_cache_in_growing_parts(engine: Engine, another: Member) -> None:
    assert engine.scheduler.wants_step()
    assert _given(engine, []) == [4, 8, 16, 2, 0]
    assert engine.queue.num_cached == 10
    # The next time it begins with a small part again.
    (account,) = engine.accounts
    account.member.release(30 * PAGE)
    another.set_demand(64 * PAGE, 1)
    assert _given(engine, []) == [4, 6, 0]


def test_a_busy_engine_gives_all_at_once(engine: Engine, another: Member) -> None:
    assert another.info().demand
    # Its next pass comes a whole step later.
    running = [SimpleNamespace(num_tokens=1, num_computed_tokens=1)]
    assert _given(engine, running) == [30, 0]


def test_acts_are_noted_and_what_changes_nothing_is_not(engine: Engine) -> None:
    acts = engine.scheduler.acts
    acts.journal = []
    acts.shrink(0, 0)
    acts.empty(0, 3)
    acts.keep(0, 0)
    assert acts.journal == [], "nothing is parked or cached"
    held = engine.take(3)
    assert held is not None
    engine.free(held, cached=True)
    acts.keep(0, 3)
    acts.empty(0, 1)
    acts.keep(0, 1)
    assert acts.shrink(0, 1) == PAGE
    kinds = [(act, amount) for act, amount, _ in acts.journal if act != "grow"]
    assert kinds == [("empty", 1), ("keep", 1), ("shrink", PAGE)]
    assert engine.queue.num_cached == 1
