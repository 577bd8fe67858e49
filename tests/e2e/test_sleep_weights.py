# SPDX-License-Identifier: Apache-2.0
"""Weights on the host that leave their memory and come back, whatever fails on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcached_core._core import FaultyBackend, HostBackend, VmmError
from kvcached_core.sleep.host_file import HostFile
from kvcached_core.sleep.memory import MovedMemory
from kvcached_core.sleep.weights_copy import WeightsCopy
from kvcached_core.sleep.worker_sleep import Group, WorkerSleep

MIB = 1 << 20


class Rank:
    """A little model: two tied matrices, a view, an empty tensor, a buffer."""

    def __init__(self, directory: Path, seed: int = 0, key: str | None = "model") -> None:
        generator = torch.Generator().manual_seed(seed)
        big = torch.rand(700_000, generator=generator)
        self.weights = [
            torch.nn.Parameter(big[:640_000].view(800, 800).t(), requires_grad=False),
            torch.nn.Parameter(big[640_000:], requires_grad=False),
            torch.nn.Parameter(torch.empty(0), requires_grad=False),
            torch.nn.Parameter(torch.rand(3, 5, generator=generator).to(torch.bfloat16), False),
        ]
        self.buffers = [torch.rand(11, generator=generator)]
        self.content = [t.detach().clone() for t in [*self.weights, *self.buffers]]
        self.host = HostBackend("sleep", 64 * MIB)
        self.backend = FaultyBackend(self.host)
        self.groups = [
            Group(
                self.backend,
                MovedMemory(self.backend, tensors),
                WeightsCopy(self.backend, directory, group_key, resident=False),
            )
            for tensors, group_key in ((self.weights, key), (self.buffers, None))
        ]
        self.sleep = WorkerSleep(self.groups[0], {"kv_cache": self.groups[1]})

    def intact(self) -> bool:
        now = [*self.weights, *self.buffers]
        return all(torch.equal(a, b) for a, b in zip(now, self.content, strict=True))


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


def test_moved_tensors_are_what_they_were(rank: Rank) -> None:
    assert rank.intact()
    weights = rank.weights
    assert weights[0].stride() == (1, 800)
    begin = weights[0].untyped_storage().data_ptr()
    assert weights[1].data_ptr() == begin + weights[0].data_ptr() - begin + 640_000 * 4
    assert weights[3].dtype == torch.bfloat16
    assert weights[3].data_ptr() % 64 == 0


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_gives_the_memory_back(rank: Rank, level: int) -> None:
    before = rank.host.physical_bytes
    addresses = [w.data_ptr() for w in rank.weights]
    rank.sleep.sleep(level)
    assert rank.host.physical_bytes == before - rank.sleep.num_bytes
    assert rank.sleep.away() == rank.sleep.num_bytes == 6 * MIB
    rank.sleep.wake()
    assert rank.host.physical_bytes == before
    assert [w.data_ptr() for w in rank.weights] == addresses
    assert torch.equal(rank.buffers[0], rank.content[-1])
    assert rank.intact() == (level == 1)


_TOUCHES = """
import sys
from pathlib import Path
from tests.e2e.test_sleep_weights import Rank
rank = Rank(Path(sys.argv[1]))
rank.sleep.sleep(1)
rank.weights[1].sum()
"""


def test_touching_what_sleeps_is_a_fault(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _TOUCHES, str(tmp_path)], check=False)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


def _each_call(rank: Rank, act: Callable[[], Any]) -> int:
    """Fails every call that `act` makes, one after the other; how many there were."""
    for nth in range(1, 100):
        rank.backend.fail(nth)
        try:
            act()
        except VmmError as error:
            assert "injected" in str(error)
            assert rank.sleep.away() in (0, rank.sleep.num_bytes), "half asleep"
        else:
            rank.backend.clear()
            return nth - 1
    raise AssertionError("it never came through")


def test_whatever_fails_a_wake_leaves_all_asleep(rank: Rank) -> None:
    rank.sleep.sleep(1)
    held = rank.host.physical_bytes

    def wake() -> None:
        try:
            rank.sleep.wake()
        except VmmError:
            assert rank.sleep.away() == rank.sleep.num_bytes
            # The driver may have refused to take a page back: then it is taken at the next call.
            assert rank.host.physical_bytes >= held
            raise

    # Of three pages, create and map each; of two groups, set_access and upload.
    assert _each_call(rank, wake) == 3 * 2 + 2 * 2
    assert rank.intact()
    rank.sleep.sleep(1)
    assert rank.host.physical_bytes == held


def test_no_memory_is_an_error_that_leaves_all_asleep(rank: Rank) -> None:
    rank.sleep.sleep(1)
    rank.backend.fail(2, "out_of_memory", "create")
    with pytest.raises(MemoryError):
        rank.sleep.wake()
    assert rank.sleep.away() == rank.sleep.num_bytes
    rank.sleep.wake()
    assert rank.intact()


@pytest.mark.parametrize("op", ["fence", "pin", "download", "finish_copies"])
def test_a_copy_that_fails_leaves_all_awake(rank: Rank, op: Any) -> None:
    rank.backend.fail(1, op=op)
    with pytest.raises(VmmError):
        rank.sleep.sleep(1)
    assert rank.sleep.away() == 0 and rank.intact()
    rank.sleep.sleep(1)
    rank.sleep.wake()
    assert rank.intact()


def test_tags(rank: Rank) -> None:
    rank.sleep.sleep(1)
    assert rank.sleep.away_of(["kv_cache"]) == 2 * MIB
    rank.sleep.wake(["kv_cache"])
    assert rank.sleep.away() == 4 * MIB
    rank.sleep.wake(["weights"])
    assert rank.intact()


def test_what_changed_is_copied_anew(rank: Rank, tmp_path: Path) -> None:
    other = Rank(tmp_path)
    rank.sleep.sleep(1)
    other.sleep.sleep(1)
    other.sleep.wake()
    other.weights[0].add_(1)
    other.content = [t.detach().clone() for t in [*other.weights, *other.buffers]]
    other.sleep.sleep(1)
    other.sleep.wake()
    rank.sleep.wake()
    assert other.intact() and rank.intact()


def test_a_full_directory_says_what_to_do(rank: Rank, tmp_path: Path) -> None:
    for group in rank.groups:
        group._copy._directory = Path("/dev/full")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        rank.sleep.sleep(1)
    assert rank.sleep.away() == 0 and rank.intact()
    with pytest.raises(OSError, match="KVCACHED_WEIGHTS_DIR"):
        HostFile.create(tmp_path, 1 << 50)
    assert not list(tmp_path.iterdir())
