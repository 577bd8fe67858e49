# SPDX-License-Identifier: Apache-2.0
"""Two SGLang ranks that sleep and wake: alike, whatever happens on one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core._core import FaultyBackend, HostBackend, Ledger
from kvcached_core.sleep.engine_sleep import EngineSleep
from kvcached_core.sleep.memory import MovedMemory
from kvcached_core.sleep.sglang import Reload, SglangSleep
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


class Files:
    """Where the weights were loaded from."""

    def __init__(self, weights: Any, content: Any) -> None:
        self._weights, self._content = weights, content
        self.obstacle = self.problem = ""
        self.loads = 0

    def __call__(self) -> None:
        self.loads += 1
        self._weights.data.zero_()
        if self.problem:
            raise OSError(self.problem)
        self._weights.data.copy_(self._content)


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
        self.reload = Files(self.weights, self.content)
        ranks = ThreadRanks(index, shared)
        self.sleep = SglangSleep(self, ranks, worker, self.reload)  # type: ignore[arg-type]
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


def test_dropped_weights_are_loaded_again(engine: Engine) -> None:
    awake = engine.static
    for cycle in range(1, 4):
        assert engine.all(lambda sleep: sleep.release(None, 2)) == ""
        assert engine.static == 0
        assert engine.all(lambda sleep: sleep.resume(None)) == ""
        assert engine.static == awake and engine.intact
        assert [rank.reload.loads for rank in engine.ranks] == [cycle, cycle]
    # Kept ones are not, nor are those of one who names the tags.
    engine.all(lambda sleep: sleep.release(None))
    engine.all(lambda sleep: sleep.resume(None))
    engine.all(lambda sleep: sleep.release(["weights"], 2))
    engine.all(lambda sleep: sleep.resume(["weights"]))
    assert [rank.reload.loads for rank in engine.ranks] == [3, 3]
    assert not any(rank.sleep.asleep for rank in engine.ranks)


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_that_one_rank_cannot_load_again(engine: Engine, rank: int) -> None:
    awake = engine.static
    engine.all(lambda sleep: sleep.release(None, 2))
    engine.ranks[rank].reload.problem = "the files are gone"
    for _ in range(2):
        assert "the files are gone" in engine.all(lambda sleep: sleep.resume(None))
        assert engine.static == 0 and engine.ledger.total_leased() == 0
        assert all(r.sleep.asleep and r.sleep._worker.away() for r in engine.ranks)
    engine.ranks[rank].reload.problem = ""
    assert engine.all(lambda sleep: sleep.resume(None)) == ""
    assert engine.static == awake and engine.intact


def test_weights_nobody_could_load_again_are_not_dropped(engine: Engine) -> None:
    for rank in engine.ranks:
        rank.reload.obstacle = "they were made up"
    for level, said in ((2, "they were made up"), (3, "level 3")):
        answer = engine.all(lambda sleep, level=level: sleep.release(None, level))  # type: ignore
        assert said in answer
        assert not any(rank.sleep.asleep for rank in engine.ranks) and engine.intact


class Runner:
    """An engine's, whose loader does what some do to weights once they are loaded."""

    def __init__(self, load_format: str = "auto", quantization: str | None = None) -> None:
        self.server_args = SimpleNamespace(model_path="/model", load_format=load_format)
        self.model_config = SimpleNamespace(quantization=quantization)
        self.model = torch.nn.Linear(3, 2)
        self.loads: Callable[[], tuple[bool, str]] = lambda: (True, "")

    def update_weights_from_disk(self, path: str, load_format: str) -> tuple[bool, str]:
        assert (path, load_format) == ("/model", "auto")
        return self.loads()


def test_what_a_loader_moves_is_moved_back() -> None:
    runner = Runner()
    place, bias = runner.model.weight.data_ptr(), runner.model.bias.data_ptr()

    def loads() -> tuple[bool, str]:
        runner.model.weight = torch.nn.Parameter(torch.full((2, 3), 7.0))
        runner.model.bias.data.fill_(5)
        return True, ""

    runner.loads = loads
    Reload(runner)()
    assert (runner.model.weight.data_ptr(), runner.model.bias.data_ptr()) == (place, bias)
    assert runner.model.weight.unique().tolist() == [7] and runner.model.bias.tolist() == [5, 5]


def test_why_weights_are_not_loaded_again() -> None:
    runner = Runner()
    runner.loads = lambda: (False, "no such folder")
    with pytest.raises(OSError, match="/model cannot be loaded again: no such folder"):
        Reload(runner)()
    runner.loads = lambda: (_ for _ in ()).throw(KeyError("a tensor"))
    with pytest.raises(OSError, match="a tensor"):
        Reload(runner)()

    def loads() -> tuple[bool, str]:
        runner.model.weight = torch.nn.Parameter(torch.zeros(3, 2))
        return True, ""

    runner.loads = loads
    with pytest.raises(OSError, match=r"weight is another tensor.*level 1"):
        Reload(runner)()
    for obstacle in (Reload(Runner("dummy")).obstacle, Reload(Runner(quantization="fp8")).obstacle):
        assert "level 1" in obstacle
    with pytest.raises(OSError, match="dummy"):
        Reload(Runner("dummy"))()


def test_no_room(engine: Engine) -> None:
    engine.all(lambda sleep: sleep.release(None))
    greedy = engine.ledger.join("greedy")
    assert greedy.lease(engine.ledger.available())
    assert "greedy" in engine.all(lambda sleep: sleep.resume(None))
    greedy.leave()
    assert engine.all(lambda sleep: sleep.resume(None)) == ""
    assert engine.intact
