# SPDX-License-Identifier: Apache-2.0
"""The worker half on host memory: the step's list, the ledger and the warm-up."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvcached_core import ArenaShape, Ledger, Member, StepOps, WorkerArena, WorkerBinding
from kvcached_core._core import HostBackend
from kvcached_core.plan import RankDevice
from kvcached_core.static_memory import follow_static
from tests.support.nvml_card import Card

PAGE = 1 << 16


class Rank:
    """A worker with the scheduler's side of its member."""

    def __init__(self, path: Path, shape: ArenaShape, capacity: int = 64 * PAGE) -> None:
        self.ledger = Ledger(str(path / "host-0.ledger"), capacity)
        self.member: Member = self.ledger.join("engine")
        self.backend = HostBackend("0", capacity)
        binding = WorkerBinding(
            shape=shape,
            ledger_path=self.ledger.path,
            capacity_bytes=capacity,
            headroom_bytes=0,
            slot=self.member.slot,
            generation=self.member.generation,
            retry_ms=50,
        )
        assert self.member.lease(PAGE * shape.segments * -(-shape.block_bytes // PAGE))
        self.arena = WorkerArena(self.backend, binding)

    def view(self, segment: int = 0) -> np.ndarray:
        return np.from_dlpack(self.arena.raw_tensor(segment))

    def check(self) -> None:
        info = self.member.info()
        assert info.committed == self.arena.committed_bytes <= info.leased
        assert self.backend.physical_bytes == info.committed


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path, ArenaShape(num_blocks=40, block_bytes=PAGE, page_bytes=PAGE))
    yield rank
    rank.arena.close()


def settle(rank: Rank) -> None:
    rank.arena._mapper.drain()
    rank.check()


def test_a_committed_block_can_be_written_and_reads_zero_at_first(rank: Rank) -> None:
    assert rank.member.lease(3 * PAGE)
    rank.arena.apply(StepOps(commit=[(5, 8)], commit_ahead=[], decommit=[]))
    blocks = rank.view().reshape(40, PAGE)
    assert not blocks[5:8].any()
    blocks[5:8] = 7
    assert (blocks[5:8] == 7).all()
    settle(rank)


def test_decommitted_bytes_return_to_the_ledger(rank: Rank) -> None:
    assert rank.member.lease(3 * PAGE)
    rank.arena.apply(StepOps([(5, 8)], [], []))
    rank.arena.apply(StepOps([], [], [(5, 7)]))
    settle(rank)
    assert rank.member.info().leased == 2 * PAGE  # the null block and block 7


def test_what_is_committed_ahead_is_there_before_the_next_step(rank: Rank) -> None:
    assert rank.member.lease(8 * PAGE)
    rank.arena.apply(StepOps([], [(1, 9)], []))
    rank.arena.apply(StepOps([], [], []))
    assert not rank.view().reshape(40, PAGE)[1:9].any()
    rank.check()


@pytest.mark.parametrize("computing", [False, True])
def test_a_wait_behind_the_devices_own_work_is_hidden(rank: Rank, computing: bool) -> None:
    assert rank.member.lease(8 * PAGE)
    asked = []

    def is_computing() -> bool:
        asked.append(rank.arena.committed_bytes)
        return computing

    rank.arena._is_computing = is_computing
    rank.arena.apply(StepOps([], [], []))
    assert not asked  # there was nothing to wait for
    before = rank.member.info().histograms["step"].sum_s
    rank.arena.apply(StepOps([(1, 9)], [], []))
    assert asked == [9 * PAGE]  # once it was there
    waited_s = rank.member.info().histograms["step"].sum_s - before
    assert waited_s == 0 if computing else waited_s >= 20e-6


def test_a_block_given_up_can_come_back_at_once(rank: Rank) -> None:
    assert rank.member.lease(2 * PAGE)
    rank.arena.apply(StepOps([(1, 3)], [], []))
    rank.view().reshape(40, PAGE)[1:3] = 9
    rank.arena.apply(StepOps([], [], [(1, 3)]))
    assert rank.member.lease(PAGE)
    rank.arena.apply(StepOps([(2, 3)], [], []))
    assert not rank.view().reshape(40, PAGE)[2].any()
    settle(rank)
    assert rank.member.info().leased == 2 * PAGE


def test_the_warm_up_leases_for_itself_and_ends_with_the_first_step(rank: Rank) -> None:
    rank.arena.warm_up({0, 1, 2, 9})
    rank.arena.warm_up({1, 2, 3})
    assert rank.member.info().leased == 5 * PAGE
    rank.view().reshape(40, PAGE)[[1, 2, 3, 9]] = 1
    rank.check()
    assert rank.member.lease(PAGE)
    rank.arena.apply(StepOps([(1, 2)], [], []))
    settle(rank)
    assert rank.member.info().leased == 2 * PAGE
    assert not rank.view().reshape(40, PAGE)[1].any()


def test_a_warm_up_beyond_the_ledger_says_what_it_needs(tmp_path: Path) -> None:
    rank = Rank(tmp_path, ArenaShape(40, PAGE, PAGE), capacity=8 * PAGE)
    with pytest.raises(MemoryError, match="max_num_batched_tokens"):
        rank.arena.warm_up(set(range(1, 20)))
    rank.check()
    rank.arena.close()


def test_blocks_that_straddle_pages_share_their_pages_lease(tmp_path: Path) -> None:
    rank = Rank(tmp_path, ArenaShape(num_blocks=40, block_bytes=PAGE * 3 // 4, page_bytes=PAGE))
    assert rank.member.lease(2 * PAGE)
    rank.arena.apply(StepOps([(1, 4)], [], []))  # pages 0, 1 and 2
    rank.check()
    rank.arena.apply(StepOps([], [], [(2, 4)]))
    settle(rank)
    assert rank.member.info().leased == 2 * PAGE
    rank.arena.close()


def test_every_segment_of_a_per_layer_arena_has_the_block(tmp_path: Path) -> None:
    rank = Rank(tmp_path, ArenaShape(num_blocks=20, block_bytes=PAGE, page_bytes=PAGE, segments=3))
    assert rank.member.lease(3 * PAGE)
    rank.arena.apply(StepOps([(4, 5)], [], []))
    for segment in range(3):
        rank.view(segment).reshape(20, PAGE)[4] = segment + 1
    assert [int(rank.view(s).reshape(20, PAGE)[4, 0]) for s in range(3)] == [1, 2, 3]
    settle(rank)
    rank.arena.close()


def test_copies_of_a_configuration_share_the_arena(rank: Rank) -> None:
    assert copy.deepcopy({"elastic": rank.arena})["elastic"] is rank.arena


def test_closing_returns_everything(tmp_path: Path) -> None:
    rank = Rank(tmp_path, ArenaShape(40, PAGE, PAGE))
    assert rank.member.lease(4 * PAGE)
    rank.arena.apply(StepOps([(1, 5)], [], []))
    rank.arena.close()
    assert rank.backend.physical_bytes == 0
    assert rank.member.info().committed == 0
    rank.member.leave()
    assert rank.ledger.total_leased() == 0


def test_what_is_not_kv_is_held_or_to_come(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 pages registered, of which the framework's allocator holds 12 and then 16, and a context
    of 3 pages that the driver does not tell of but counts; beside a trainer with 10.
    """
    reserved = [12 * PAGE]
    cuda = SimpleNamespace(memory_reserved=lambda: reserved[0], empty_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    card = Card(total=69 * PAGE, reserved=5 * PAGE)
    card.put_in(monkeypatch)
    rank.member.set_static(20 * PAGE)
    assert rank.ledger.available() == (64 - 1 - 20) * PAGE
    card.allocated = (1 + 12 + 3 + 10) * PAGE
    static = follow_static(rank.arena, RankDevice("cuda", "gpu-1", 64 * PAGE, PAGE, 20 * PAGE))
    left = (64 - 1 - 20 - 3 - 10) * PAGE
    assert rank.ledger.available() == left
    static.refresh(rank.arena.committed_bytes)
    assert rank.member.info().static_bytes == 20 * PAGE + rank.member.info().guessed
    assert rank.ledger.available() == left
    reserved[0] += 4 * PAGE
    card.allocated += 4 * PAGE
    time.sleep(0.11)
    static.refresh(rank.arena.committed_bytes)
    assert rank.ledger.external == (16 + 3 + 10) * PAGE
    assert rank.ledger.available() == left
