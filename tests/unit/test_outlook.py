# SPDX-License-Identifier: Apache-2.0
"""Running requests go on: neither new ones nor who waits elsewhere gets what they take next."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcached_core import ArenaShape, Ledger
from kvcached_core.holding import Holding
from kvcached_core.outlook import Outlook
from kvcached_core.pool import Pool
from tests.support.block_pool import PAGE, Engine
from tests.support.little_vllm import Prompt, World


@dataclass
class Request:
    num_tokens: int
    num_output_tokens: int = 0
    max_tokens: int = 4096
    num_computed_tokens: int = 0


def outlook_of(engine: Engine, running: list[Request]) -> Outlook:
    outlook = Outlook(engine.scheduler.pools[0])
    outlook.begin(running)
    return outlook


@pytest.mark.parametrize(
    ("request_", "blocks"),
    [
        (Request(160), 4),  # new: 64 tokens
        (Request(160, max_tokens=20), 2),  # but no more than it may
        (Request(480, 320), 20),  # as much again as it has generated
        (Request(480, 320, max_tokens=400), 5),
        (Request(480, 320, max_tokens=320), 0),
        (Request(481, 321, max_tokens=320), 0),
        (Request(475, 320, max_tokens=330), 1),  # across the end of a block
        (Request(470, 320, max_tokens=330), 0),  # within one
    ],
)
def test_what_a_request_is_likely_to_take(request_: Request, blocks: int) -> None:
    engine = Engine(None, 100, PAGE)
    engine.take(40)  # more than any of them generated
    assert outlook_of(engine, [request_]).blocks(0) == blocks
    assert outlook_of(engine, [request_, request_]).blocks(0) == 2 * blocks


def test_with_plenty_of_memory_no_request_is_looked_at() -> None:
    engine = Engine(None, 100, PAGE)
    engine.take(9)  # and the null block
    cached = engine.take(50)
    assert cached is not None
    engine.free(cached, cached=True)  # no request's

    class Untouched(Request):
        @property
        def num_tokens(self) -> int:  # type: ignore[override]
            pytest.fail("looked at")

        @num_tokens.setter
        def num_tokens(self, value: int) -> None:
            pass

    outlook = outlook_of(engine, [Untouched(160)] * 2)
    assert outlook.blocks(10 + 2 * 4) == 0
    with pytest.raises(pytest.fail.Exception):
        outlook.blocks(10 + 2 * 4 - 1)


def test_who_came_in_since_counts_as_new() -> None:
    engine = Engine(None, 100, PAGE)
    engine.take(40)
    running = [Request(480, 320)]
    outlook = outlook_of(engine, running)
    assert outlook.blocks(0) == 20
    running.append(Request(160))
    running.append(Request(160))
    assert outlook.blocks(0) == 28
    outlook.begin(running[1:])
    assert outlook.blocks(0) == 8


def test_a_pool_of_states_has_no_outlook() -> None:
    states = Pool(100, [ArenaShape(100, PAGE, PAGE)], (), Holding(fixed_blocks=1), decay_s=1)
    outlook = Outlook(states)
    outlook.begin([Request(480, 320)] * 100)
    assert outlook.blocks(0) == 0


def test_a_new_request_leaves_room_for_what_runs(tmp_path: Path) -> None:
    engine = Engine(Ledger(str(tmp_path / "host-0.ledger"), 100 * PAGE, 0), 200, PAGE)
    running = [Request(480, 320), Request(160)]
    assert engine.take(40) is not None  # 59 could be had yet, of which these will take 24
    engine.scheduler.begin_pass(running, [Request(160)])
    assert not engine.queue.lacks(35)
    assert engine.queue.lacks(36)
    assert not engine.queue.lacks(59, running=True)
    assert engine.queue.lacks(60, running=True)
    engine.scheduler.take_ops()


def test_what_is_guaranteed_is_used_to_the_last(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 100 * PAGE, 0)
    engine = Engine(ledger, 200, PAGE, join={"guarantee": 60 * PAGE})
    running = [Request(480, 320), Request(160)]
    assert engine.take(40) is not None  # and the null block; 59 could be had, 19 of them guaranteed
    other = Ledger(str(tmp_path / "host-0.ledger"), 100 * PAGE, 0).join("other")
    assert other.lease(40 * PAGE)
    engine.scheduler.begin_pass(running, [Request(160)])
    assert not engine.queue.lacks(19)
    assert engine.queue.lacks(20)
    engine.scheduler.take_ops()


def test_without_a_ledger_a_new_request_gets_all_there_is() -> None:
    engine = Engine(None, 100, PAGE)
    engine.take(40)
    engine.scheduler.begin_pass([Request(480, 320)], [Request(160)])
    assert not engine.queue.lacks(59)
    engine.scheduler.take_ops()


def test_what_runs_goes_before_what_an_equal_waits_for(tmp_path: Path) -> None:
    path = str(tmp_path / "host-0.ledger")
    waits = Ledger(path, 100 * PAGE, 0).join("waits")
    engine = Engine(Ledger(path, 100 * PAGE, 0), 200, PAGE)
    assert engine.take(59) is not None
    waits.set_demand(60 * PAGE, 1)
    engine.scheduler.begin_pass([Request(480, 320), Request(160)], [Request(16)])
    assert engine.queue.lacks(1)
    assert not engine.queue.lacks(2, running=True)
    assert engine.queue.ensure(2, (), running=True)
    engine.finish()
    guaranteed = Ledger(path, 100 * PAGE, 0).join("guaranteed", guarantee=38 * PAGE)
    assert guaranteed.info().guarantee
    engine.scheduler.begin_pass([Request(480, 320), Request(160)])
    assert engine.queue.lacks(3, running=True)


@pytest.mark.parametrize("seed", range(4))
def test_bursts_that_do_not_fit_together_are_not_computed_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world = World(tmp_path, monkeypatch)
    prompts = [[Prompt(12, 64, grows=True) for _ in range(6)] for _ in range(4)]
    engines = world.engines(100, prompts, cached=False, whole=True)
    passes = world.serve(engines, random.Random(seed))
    # It took 222 to 326 preemptions and 375 to 618 passes while running requests gave way.
    assert sum(engine.preemptions for engine in engines) < 48
    assert passes < 340
