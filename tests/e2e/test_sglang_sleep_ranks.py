# SPDX-License-Identifier: Apache-2.0
"""Two SGLang ranks that sleep and wake: alike, whatever happens on one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcached_core._core import FaultyBackend, HostBackend, Ledger
from kvcached_core.sleep.engine_sleep import EngineSleep
from kvcached_core.sleep.memory import MovedMemory
from kvcached_core.sleep.sglang import SglangSleep
from kvcached_core.sleep.weights_copy import WeightsCopy
from kvcached_core.sleep.worker_sleep import Group, WorkerSleep

MIB = 1 << 20
CAPACITY = 64 * MIB


class Shared:
    """What the ranks exchange, in threads instead of processes."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.values: list[Any] = [None] * size


class ThreadRanks:
    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size, self._shared = rank, len(shared.values), shared

    def gather(self, value: Any) -> list[Any]:
        self._shared.values[self.rank] = value
        self._shared.barrier.wait()
        values = list(self._shared.values)
        self._shared.barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


class Scheduler:
    sleep: EngineSleep

    def refresh_usage(self, force: bool = False) -> None:
        pass


class Rank:
    """As an `SglangRank`: on the first one is the scheduler half."""

    def __init__(self, index: int, shared: Shared, ledger: Ledger, directory: Path) -> None:
        self.backend = FaultyBackend(HostBackend("rank", CAPACITY))
        self.weights = torch.nn.Parameter(torch.rand(500_000) + index, requires_grad=False)
        self.content = self.weights.detach().clone()
        buffer = torch.rand(10)
        worker = WorkerSleep(
            self._group([self.weights], directory), {"weights": self._group([buffer], directory)}
        )
        self.scheduler: Any = None
        if index == 0:
            self.scheduler = Scheduler()
            self.member = ledger.join("engine", 2 * (worker.num_bytes + 3 * MIB))
            self.scheduler.sleep = EngineSleep(
                self.scheduler, {"host": (ledger, self.member)}, ["host"] * 2, 0.2
            )
        self.sleep = SglangSleep(self, ThreadRanks(index, shared), worker)  # type: ignore[arg-type]
        self.given = 0

    def _group(self, tensors: list[Any], directory: Path) -> Group:
        copy = WeightsCopy(self.backend, directory, None, resident=False)
        return Group(self.backend, MovedMemory(self.backend, tensors), copy)

    def give_all(self) -> None:
        self.given += 1

    def spare(self) -> int:
        return 3 * MIB

    def note_away(self, num_bytes: int) -> None:
        self.noted = num_bytes

    @property
    def intact(self) -> bool:
        return bool(torch.equal(self.weights, self.content))


class Engine:
    def __init__(self, tmp_path: Path) -> None:
        self.ledger = Ledger(tmp_path / "host.ledger", CAPACITY, 0)
        shared = Shared(2)
        self.ranks = [Rank(i, shared, self.ledger, tmp_path / f"weights{i}") for i in range(2)]
        self._pool = ThreadPoolExecutor(2)

    def all(self, act: Callable[[SglangSleep], str]) -> str:
        """What every rank answers, which must be the same."""
        answers = set(self._pool.map(lambda rank: act(rank.sleep), self.ranks))
        assert len(answers) == 1, answers
        return answers.pop()

    @property
    def static(self) -> int:
        return self.ranks[0].member.info().static_bytes

    @property
    def intact(self) -> bool:
        return all(rank.intact for rank in self.ranks)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


def test_there_and_back(engine: Engine) -> None:
    awake = engine.static
    for _ in range(3):
        assert engine.all(lambda sleep: sleep.release(None)) == ""
        assert engine.static == 0
        assert all(rank.sleep.asleep for rank in engine.ranks)
        assert engine.all(lambda sleep: sleep.resume(None)) == ""
        assert engine.static == awake and engine.intact
    assert [rank.given for rank in engine.ranks] == [3, 3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("op", ["create", "map", "set_access", "upload"])
def test_a_wake_that_fails_on_one_rank(engine: Engine, rank: int, op: Any) -> None:
    awake = engine.static
    engine.all(lambda sleep: sleep.release(None))
    engine.ranks[rank].backend.fail(1, op=op)
    assert "injected" in engine.all(lambda sleep: sleep.resume(None))
    assert engine.static == 0 and engine.ledger.total_leased() == 0
    assert all(r.sleep.asleep and r.sleep._worker.away() for r in engine.ranks)
    assert engine.all(lambda sleep: sleep.resume(None)) == ""
    assert engine.static == awake and engine.intact


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sleep_that_fails_on_one_rank(engine: Engine, rank: int) -> None:
    awake = engine.static
    engine.ranks[rank].backend.fail(1, op="download")
    assert "cannot sleep" in engine.all(lambda sleep: sleep.release(None))
    assert engine.static == awake and engine.intact
    assert not any(r.sleep.asleep for r in engine.ranks)


def test_no_room(engine: Engine) -> None:
    engine.all(lambda sleep: sleep.release(None))
    greedy = engine.ledger.join("greedy")
    assert greedy.lease(engine.ledger.available())
    assert "greedy" in engine.all(lambda sleep: sleep.resume(None))
    greedy.leave()
    assert engine.all(lambda sleep: sleep.resume(None)) == ""
    assert engine.intact
