# SPDX-License-Identifier: Apache-2.0
"""Weights that leave a GPU and come back, against a driver that copies late and fails on demand."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcached_core._core import Arena, Backend, Geometry, PagePool, VmmError
from kvcached_core.sleep import compare
from kvcached_core.sleep.compare import Part
from kvcached_core.sleep.memory import PoolMemory
from kvcached_core.sleep.weights_copy import WeightsCopy
from kvcached_core.sleep.worker_sleep import Group, WorkerSleep

from .conftest import PAGE, StandIn

SIZES = (3, 1, 5)  # pages
ILLEGAL = 700


class Pool:
    """An engine's pool: allocations with addresses of their own."""

    def __init__(self, backend: Backend) -> None:
        self.pages = PagePool(backend, PAGE, 0)
        self.arenas = [Arena(backend, self.pages, Geometry(PAGE, PAGE, n + 1)) for n in SIZES]
        for index in range(len(SIZES)):
            self.map(index)

    def map(self, index: int) -> None:
        if not self.arenas[index].commit([(1, 1 + SIZES[index])]):
            raise MemoryError("out of memory")

    def unmap(self, index: int) -> None:
        self.arenas[index].decommit([(1, 1 + SIZES[index])])

    def part(self, index: int) -> Part:
        return Part(self.arenas[index].base + PAGE, SIZES[index] * PAGE)

    @property
    def mapped(self) -> list[bool]:
        return [arena.is_committed(1) for arena in self.arenas]

    def memory(self) -> PoolMemory:
        return PoolMemory(lambda: range(len(SIZES)), self.part, self.map, self.unmap)


class World:
    def __init__(self, standin: StandIn, directory: Path, key: str | None = "model") -> None:
        self.standin = standin
        self.backend: Backend = standin.backend(0)
        self.pool = Pool(self.backend)
        self.copy = WeightsCopy(self.backend, directory, key)
        self.group = Group(self.backend, self.pool.memory(), self.copy)
        self.sleep = WorkerSleep(self.group, {})
        self.write(1)

    def _contents(self, seed: int) -> list[bytes]:
        return [
            bytes((seed * 37 + index * 11 + i // 64) % 256 for i in range(size * PAGE))
            for index, size in enumerate(SIZES)
        ]

    def write(self, seed: int) -> None:
        for index, content in enumerate(self._contents(seed)):
            ctypes.memmove(self.pool.part(index).address, content, len(content))

    def byte(self, address: int) -> int:
        """What `write(1)` put there."""
        for index, content in enumerate(self._contents(1)):
            offset = address - self.pool.part(index).address
            if 0 <= offset < len(content):
                return content[offset]
        raise ValueError(address)

    def holds(self, seed: int) -> bool:
        self.backend.finish_copies()
        return all(
            ctypes.string_at(self.pool.part(index).address, len(content)) == content
            for index, content in enumerate(self._contents(seed))
        )

    def close(self) -> None:
        self.sleep.close()
        for arena in self.pool.arenas:
            arena.close()


def _files(directory: Path) -> Sequence[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_copies_are_done_by_whoever_waits(standin: StandIn, tmp_path: Path) -> None:
    world = World(standin, tmp_path)
    world.sleep.sleep(1)
    assert world.pool.mapped == [False] * 3
    assert world.sleep.away() == sum(SIZES) * PAGE
    world.sleep.wake()
    address = world.pool.part(0).address
    assert ctypes.string_at(address, PAGE) == bytes(PAGE), "copied before anybody waited"
    world.backend.copies_before(0)
    assert ctypes.string_at(address, PAGE) == bytes(PAGE), "waited on the host"
    # The default stream, on which the engine computes, has them before it goes on.
    world.backend.fence()
    assert world.holds(1)
    assert world.sleep.away() == 0
    world.close()
    del world
    gc.collect()


def test_one_copy_for_equal_weights_only(standin: StandIn, tmp_path: Path) -> None:
    worlds = [World(standin, tmp_path) for _ in range(3)]
    worlds[2].write(9)
    for world in worlds:
        world.sleep.sleep(1)
    assert worlds[0].copy.path == worlds[1].copy.path != worlds[2].copy.path
    assert _files(tmp_path) == [".draft", ".weights"]
    for world in worlds:
        world.sleep.wake()
    assert [w.holds(s) for w, s in zip(worlds, (1, 1, 9), strict=True)] == [True] * 3
    # One of two that share changes: its own copy, and the other's is as it was.
    worlds[0].write(5)
    for world in worlds[:2]:
        world.sleep.sleep(1)
    assert worlds[0].copy.path != worlds[1].copy.path
    for world in worlds[:2]:
        world.sleep.wake()
    assert worlds[0].holds(5) and worlds[1].holds(1)
    for world in worlds:
        world.close()
    assert _files(tmp_path) == []
    del world, worlds
    gc.collect()


def test_little_that_changed_lies_beside_the_common_copy(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "BLOCK", PAGE)
    worlds = [World(standin, tmp_path) for _ in range(2)]
    # Of both something is written to while they are awake, each its own.
    own = [worlds[0].pool.part(2).address + PAGE + 5, worlds[1].pool.part(1).address + PAGE - 1]
    for world in worlds:
        world.sleep.sleep(1)
        world.sleep.wake()
        world.backend.finish_copies()
    for number in (7, 8):
        for world, address in zip(worlds, own, strict=True):
            ctypes.memset(address, number, 1)
            world.sleep.sleep(1)
            assert world.copy.changed_bytes == PAGE
            assert world.copy.num_bytes == sum(SIZES) * PAGE + PAGE
        assert worlds[0].copy.path == worlds[1].copy.path
        assert _files(tmp_path) == [".draft", ".draft", ".weights"]
        for world, address in zip(worlds, own, strict=True):
            world.sleep.wake()
            world.backend.finish_copies()
            assert ctypes.string_at(address, 1) == bytes([number])
            ctypes.memset(address, world.byte(address), 1)
            assert world.holds(1)
    # As at first again: nothing is kept beside it, and it is not written back.
    for world in worlds:
        world.sleep.sleep(1)
        assert world.copy.changed_bytes == 0
        world.sleep.wake()
        assert world.holds(1)
    # Two pages of nine are too many.
    for index in (0, 2):
        ctypes.memset(worlds[0].pool.part(index).address, 9, 1)
    worlds[0].sleep.sleep(1)
    assert worlds[0].copy.path != worlds[1].copy.path
    assert worlds[0].copy.changed_bytes == 0
    for world in worlds:
        world.close()
    assert _files(tmp_path) == []
    del world, worlds
    gc.collect()


CALLS = [
    ("cuMemCreate", "hipMemCreate"),
    ("cuMemMap", "hipMemMap"),
    ("cuMemSetAccess", "hipMemSetAccess"),
    ("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"),
]


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("names", CALLS, ids=lambda names: names[0])
def test_a_wake_that_fails_leaves_all_asleep(
    standin: StandIn, tmp_path: Path, names: tuple[str, str], nth: int
) -> None:
    world = World(standin, tmp_path)
    world.sleep.sleep(1)
    held = world.pool.pages.held_bytes
    standin.fail(nth, ILLEGAL, standin.name(*names))
    with pytest.raises(VmmError):
        world.sleep.wake()
    standin.clear()
    assert world.pool.mapped == [False] * 3
    assert world.pool.pages.held_bytes == held
    assert world.sleep.away() == sum(SIZES) * PAGE
    world.sleep.wake()
    assert world.holds(1)
    world.close()
    del world
    gc.collect()


def test_a_wake_can_be_taken_back_while_it_copies(standin: StandIn, tmp_path: Path) -> None:
    world = World(standin, tmp_path)
    world.sleep.sleep(1)
    world.sleep.wake()
    world.sleep.sleep_again()
    assert world.pool.mapped == [False] * 3
    world.sleep.wake()
    assert world.holds(1)
    world.close()
    del world
    gc.collect()


@pytest.mark.parametrize(
    "names",
    [
        ("cuMemHostRegister_v2", "hipHostRegister"),
        ("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"),
        ("cuStreamSynchronize", "hipStreamSynchronize"),
    ],
    ids=lambda names: names[0],
)
def test_a_sleep_that_fails_leaves_all_awake(
    standin: StandIn, tmp_path: Path, names: tuple[str, str]
) -> None:
    world = World(standin, tmp_path)
    standin.fail(1, ILLEGAL, standin.name(*names))
    with pytest.raises(VmmError):
        world.sleep.sleep(1)
    standin.clear()
    assert world.holds(1) and world.sleep.away() == 0
    assert _files(tmp_path) == []
    world.sleep.sleep(1)
    world.sleep.wake()
    assert world.holds(1)
    world.close()
    del world
    gc.collect()
