# SPDX-License-Identifier: Apache-2.0
"""What an engine owes others, and the notes by which other ranks do the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached_core import Ledger
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
