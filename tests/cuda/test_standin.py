# SPDX-License-Identifier: Apache-2.0
"""The GPU backends against a driver that fails on demand: nothing changes, nothing leaks."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
from typing import Any

import pytest

from kvcached_core._core import Arena, Backend, Geometry, Mapper, PagePool, VmmError

from .conftest import PAGE, Live, StandIn

GEOMETRY = (PAGE * 3 // 2, PAGE, 16, 2)
BLOCKS = GEOMETRY[2]
SCRIPT: list[tuple[str, list[tuple[int, int]]]] = [
    ("commit", [(1, 4)]),
    ("commit", [(8, 9), (12, 15)]),
    ("decommit", [(2, 3)]),
    ("commit", [(5, 8)]),
    ("decommit", [(1, 2), (13, 14)]),
    ("commit", [(1, 3), (9, 12)]),
    ("decommit", [(5, 12), (3, 4)]),
    ("commit", [(4, 6)]),
]
CODES = {"out of memory": 2, "illegal address": 700}


class World:
    """A backend with a pool and an arena on it."""

    def __init__(self, standin: StandIn, ready: int) -> None:
        self.standin = standin
        self.backend: Backend = standin.backend(0)
        self.pool = PagePool(self.backend, PAGE, ready)
        self.arena = Arena(self.backend, self.pool, Geometry(*GEOMETRY), zero_recycled=True)

    def committed(self) -> list[int]:
        return [block for block in range(BLOCKS) if self.arena.is_committed(block)]

    def _content(self, block: int, segment: int) -> tuple[int, bytes]:
        address = self.arena.base + segment * self.arena.segment_stride + block * GEOMETRY[0]
        return address, bytes([1 + block * 7 + segment * 31]) * GEOMETRY[0]

    def write(self) -> None:
        for block in self.committed():
            for segment in range(GEOMETRY[3]):
                address, content = self._content(block, segment)
                ctypes.memmove(address, content, len(content))

    def intact(self) -> bool:
        return all(
            ctypes.string_at(address, len(content)) == content
            for block in self.committed()
            for segment in range(GEOMETRY[3])
            for address, content in [self._content(block, segment)]
        )

    def state(self) -> tuple[object, ...]:
        return (
            self.committed(),
            self.arena.committed_bytes,
            self.pool.held_bytes - self.pool.ready_bytes,
            self.arena.stuck_bytes,
            self.standin.live().mappings,
            self.standin.live().ranges,
        )

    def apply(self, step: tuple[str, list[tuple[int, int]]]) -> str | None:
        """The error, if it failed."""
        kind, ranges = step
        try:
            if kind == "decommit":
                self.arena.decommit(ranges)
                return None
            return None if self.arena.commit(ranges) else "out of memory"
        except VmmError as error:
            return str(error)


def open_world(standin: StandIn, ready: int) -> tuple[World, int]:
    """Opens one, again if the armed failure hits that; and tells how often it failed."""
    try:
        return World(standin, ready), 0
    except VmmError:
        pass  # and let go of the traceback, which holds what was opened
    gc.collect()
    assert standin.live() == Live()
    return World(standin, ready), 1


@pytest.mark.parametrize("ready", [0, 3 * PAGE], ids=["no ready pages", "ready pages"])
@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_any_failing_call_changes_nothing(standin: StandIn, code: int, ready: int) -> None:
    total_failures = 0
    k = 0
    while True:
        k += 1
        first = standin.calls()
        standin.fail(k, code)
        world, failures = open_world(standin, ready)
        for step in SCRIPT:
            world.write()
            before, bytes_before = world.state(), standin.live().bytes
            error = world.apply(step)
            assert standin.live().bytes == world.pool.held_bytes
            if error is None:
                continue
            failures += 1
            assert world.state() == before, (k, step, error)
            assert world.intact(), (k, step, error)
            if ready == 0:
                assert standin.live().bytes == bytes_before
            assert world.apply(step) is None
        assert failures <= 1
        total_failures += failures
        del world
        assert standin.live() == Live(), k
        if standin.calls() - first < k:
            break
    assert total_failures > 50  # the failures were where the work is


@pytest.mark.parametrize("times", [2, 3, 6])
def test_failures_in_a_row_are_repaired_later(standin: StandIn, times: int) -> None:
    k = 0
    stuck = 0
    device = standin.current_device
    while True:
        k += 1
        world = World(standin, 0)
        first = standin.calls()
        standin.fail(k, 700, times=times)
        for step in SCRIPT:
            before = world.committed()
            if world.apply(step) is None:
                continue
            assert world.committed() == before
            assert standin.live().bytes == world.pool.held_bytes
            stuck += world.arena.stuck_bytes > 0
            standin.clear()
            assert world.apply(step) is None
            assert world.arena.stuck_bytes == 0
            world.write()
        reached = standin.calls() - first >= k
        standin.clear()
        standin.current_device = device  # giving it back may have failed twice as well
        del world
        assert standin.live() == Live(), k
        if not reached:
            break
    assert stuck > 0


def test_open(standin: StandIn) -> None:
    first, second = standin.backend(0), standin.backend(1)
    assert first.granularity == PAGE
    assert first.device_key == standin.name(
        "gpu-GPU-00112233-4455-6677-8899-aabbccddeeff", "gpu-GPU-00c0ffee00c0ffee"
    )
    assert second.device_key != first.device_key
    assert first.memory_info() == (256 * PAGE, 256 * PAGE)
    first.fence()
    with pytest.raises(VmmError, match="device 2 is not visible"):
        standin.backend(2)


def test_memory_is_of_the_device_that_was_asked_for(standin: StandIn) -> None:
    first, second = standin.backend(0), standin.backend(1)
    pool = PagePool(second, PAGE)
    arena = Arena(second, pool, Geometry(PAGE, PAGE, 8))
    assert arena.commit([(1, 3)])
    assert second.memory_info() == (253 * PAGE, 256 * PAGE)
    assert first.memory_info() == (256 * PAGE, 256 * PAGE)


def test_the_callers_device_stays_current(standin: StandIn) -> None:
    before = standin.current_device
    other = standin.backend(1)
    backend = standin.backend(0)
    try:
        standin.current_device = 1
        arena = Arena(backend, PagePool(backend, PAGE), Geometry(PAGE, PAGE, 8))
        arena.commit([(1, 3)])
        backend.memory_info()
        assert standin.current_device == 1
        del arena
        assert standin.current_device == 1
    finally:
        standin.current_device = before
    del other


def test_out_of_memory_is_an_answer(standin: StandIn) -> None:
    backend = standin.backend(0)
    arena = Arena(backend, PagePool(backend, PAGE), Geometry(PAGE, PAGE, 512))
    assert not arena.commit([(1, 300)])
    assert standin.live().handles == 1
    assert arena.commit([(1, 256)])
    with pytest.raises(VmmError, match="OUT_OF_MEMORY"):
        Mapper(arena).commit_now([(256, 257)])


def test_errors_name_the_call_and_the_code(standin: StandIn) -> None:
    backend = standin.backend(0)
    arena = Arena(backend, PagePool(backend, PAGE), Geometry(PAGE, PAGE, 8))
    standin.fail(1, 700, standin.name("cuMemMap", "hipMemMap"))
    with pytest.raises(VmmError, match=r"mapping a page failed: ILLEGAL_ADDRESS \(700\)"):
        arena.commit([(1, 2)])
    standin.fail(1, 12345, standin.name("cuMemUnmap", "hipMemUnmap"))
    assert arena.commit([(1, 2)])
    with pytest.raises(VmmError, match=r"unknown error \(12345\)"):
        arena.decommit([(1, 2)])


def test_fewest_calls(standin: StandIn) -> None:
    backend = standin.backend(0)
    arena = Arena(backend, PagePool(backend, PAGE), Geometry(PAGE, PAGE, 64))
    accesses = standin.calls(standin.name("cuMemSetAccess", "hipMemSetAccess"))
    unmaps = standin.calls(standin.name("cuMemUnmap", "hipMemUnmap"))
    assert arena.commit([(1, 33)])
    arena.decommit([(1, 33)])
    assert standin.calls(standin.name("cuMemSetAccess", "hipMemSetAccess")) - accesses == 1
    # HIP unmaps page by page.
    made = standin.calls(standin.name("cuMemUnmap", "hipMemUnmap")) - unmaps
    assert made == (1 if standin.vendor == "cuda" else 32)


def test_recycled_pages_are_zeroed_on_a_stream(standin: StandIn) -> None:
    backend = standin.backend(0)
    pool = PagePool(backend, PAGE, 4 * PAGE)
    arena = Arena(backend, pool, Geometry(PAGE, PAGE, 8), zero_recycled=True)
    assert arena.commit([(1, 3)])
    ctypes.memset(arena.base + PAGE, 0xAB, 2 * PAGE)
    arena.decommit([(1, 3)])
    assert standin.live().streams == 0
    assert arena.commit([(4, 6)])
    assert standin.live().streams == 1
    assert ctypes.string_at(arena.base + 4 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
    assert arena.calls["zero"] == 1


def test_the_tensor_names_its_device(standin: StandIn) -> None:
    backend = standin.backend(1)
    arena = Arena(backend, PagePool(backend, PAGE), Geometry(PAGE, PAGE, 8))
    view: Any = arena.dlpack([8, PAGE], [PAGE, 1], "uint8")
    assert view.__dlpack_device__() == (2 if standin.vendor == "cuda" else 10, 1)


def test_a_library_that_is_not_there(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    variable = standin.name("KVCACHED_LIBCUDA", "KVCACHED_LIBHIP")
    monkeypatch.setenv(variable, str(tmp_path / "none.so"))
    with pytest.raises(VmmError, match=f"no GPU driver library.*{variable}"):
        standin.backend(0)
    libc = ctypes.util.find_library("c")
    assert libc is not None
    monkeypatch.setenv(variable, libc)
    with pytest.raises(VmmError, match="driver library lacks"):
        standin.backend(0)


def test_a_gpu_without_virtual_memory(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    if standin.vendor == "hip":
        pytest.skip("ROCm devices are not asked: the attribute's number differs by release")
    monkeypatch.setenv("STANDIN_VMM", "0")
    with pytest.raises(VmmError, match="no virtual memory management"):
        standin.backend(0)
