# SPDX-License-Identifier: Apache-2.0
"""Engines with prompts for more than an equal share of the memory, computed in chunks: one after
the other, all of them are served."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.support.block_pool import PAGE, Engine
from tests.support.little_vllm import Prompt, World


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("engines", "pages"), [(2, 31), (3, 32), (3, 45)])
def test_all_are_served_one_after_the_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: int,
    pages: int,
    cached: bool,
    whole: bool,
) -> None:
    for seed in range(6):
        at_random = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir(mode=0o700)
        world = World(folder, monkeypatch)
        prompts = [
            [Prompt(at_random.randint(12, 21), 20) for _ in range(3)] for _ in range(engines)
        ]
        all_ = world.engines(pages, prompts, cached=cached, whole=whole)
        world.serve(all_, at_random)
        for engine in all_:
            engine.engine.scheduler.close()


def test_the_only_request_of_an_engine_goes_on_while_an_equal_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch)
    prompts = [[Prompt(18, 20)], [Prompt(18, 20)]]
    runs, waits = world.engines(31, prompts, cached=False, whole=True)
    for _ in range(2):  # so that what is left is not enough for the other
        runs.begin()
        runs.schedule()
        runs.end()
    assert world.serve([runs, waits], random.Random(0)) < 60
    assert runs.preemptions == waits.preemptions == 0


@pytest.mark.parametrize(("priority", "stands_back"), [(0, True), (1, False)])
def test_who_gives_way_stands_back_for_its_equals_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, priority: int, stands_back: bool
) -> None:
    world = World(tmp_path, monkeypatch)
    path = str(tmp_path / "host-0.ledger")
    other = Ledger(path, 31 * PAGE, 0).join("other")
    assert other.lease(20 * PAGE)
    mine = Ledger(path, 31 * PAGE, 0)
    engine = Engine(mine, 1000, PAGE, join={"priority": priority})
    other.set_demand(20 * PAGE, 1)
    for _ in range(2):
        engine.scheduler.begin_pass((), [Prompt(18, 1)])
        assert not engine.scheduler.rivals.turns_away(False)
        assert engine.queue.lacks(18)
        engine.scheduler.take_ops(0)
        world.now += 1.01
        other.set_demand(20 * PAGE, 1)
    world.now -= 1.0
    engine.scheduler.begin_pass((), [Prompt(18, 1)])
    assert engine.scheduler.rivals.turns_away(False) is stands_back
    assert not engine.scheduler.rivals.turns_away(True)
