# SPDX-License-Identifier: Apache-2.0
"""The memory side through its Python bindings, on host memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcached_core._core import (
    Arena,
    FaultyBackend,
    Geometry,
    HostBackend,
    Ledger,
    Mapper,
    PagePool,
    VmmError,
)

PAGE = 64 << 10
CAPACITY = 64 * PAGE
TORCH_TYPES = [
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
]


def make_arena(
    blocks: int = 16, block_bytes: int = PAGE, segments: int = 1, ready: int = 0
) -> tuple[HostBackend, PagePool, Arena]:
    backend = HostBackend("unit", CAPACITY)
    pool = PagePool(backend, PAGE, ready)
    return backend, pool, Arena(backend, pool, Geometry(block_bytes, PAGE, blocks, segments))


def test_backend() -> None:
    backend = HostBackend("node.0", CAPACITY)
    assert backend.device_key == "host-node.0"
    assert PAGE % backend.granularity == 0
    assert backend.memory_info() == (CAPACITY, CAPACITY)
    backend.fence()
    with pytest.raises(VmmError, match="name is 1 to 64"):
        HostBackend("../escape", CAPACITY)


def test_commit_and_decommit() -> None:
    backend, pool, arena = make_arena(segments=2)
    assert arena.segment_stride == 16 * PAGE
    assert arena.reserved_bytes == 2 * 16 * PAGE
    assert arena.committed_bytes == 2 * PAGE
    assert arena.commit([(1, 3), (8, 9)])
    assert [b for b in range(16) if arena.is_committed(b)] == [0, 1, 2, 8]
    assert arena.committed_bytes == pool.held_bytes == backend.physical_bytes == 8 * PAGE
    assert arena.calls == {"map": 8, "set_access": 6, "unmap": 0, "zero": 0}
    arena.decommit([(1, 3)])
    assert backend.physical_bytes == 4 * PAGE
    with pytest.raises(VmmError, match="block 1 is not committed"):
        arena.decommit([(1, 2)])
    with pytest.raises(VmmError, match="block 0 stays committed"):
        arena.decommit([(0, 1)])
    with pytest.raises(TypeError):
        arena.commit([1, 2])  # type: ignore[list-item]


def test_out_of_memory_is_false_and_everything_else_raises() -> None:
    backend, _, arena = make_arena(blocks=128)
    assert arena.commit([(1, 128)]) is False
    assert backend.physical_bytes == PAGE
    assert arena.commit([(1, 64)]) is True
    mapper = Mapper(arena, retry_ms=5)
    with pytest.raises(VmmError, match="capacity is used up"):
        mapper.commit_now([(64, 65)])
    mapper.commit_ahead([(64, 65)])
    with pytest.raises(VmmError, match="a queued commit failed"):
        mapper.drain()
    mapper.drain()


def test_close() -> None:
    backend, _, arena = make_arena()
    arena.commit([(1, 5)])
    arena.close()
    assert backend.physical_bytes == 0
    with pytest.raises(VmmError, match="closed"):
        arena.commit([(1, 2)])
    with pytest.raises(VmmError, match="closed"):
        arena.dlpack([1], [1], "uint8")


def test_numpy_sees_the_arena() -> None:
    _, _, arena = make_arena(segments=2)
    arena.commit([(1, 3)])
    whole = np.from_dlpack(arena.dlpack([2, 16, PAGE], [16 * PAGE, PAGE, 1], "uint8"))
    whole[1, 2] = 7
    assert whole.strides == (16 * PAGE, PAGE, 1)
    assert whole.ctypes.data == arena.base
    # The same bytes as another type, from an offset, with blocks as the middle dimension.
    tail = np.from_dlpack(arena.dlpack([2, 3, 4], [8, PAGE // 4, 2], "int32", arena.segment_stride))
    assert tail.strides == (32, PAGE, 8)
    assert (tail[:, 2] == 0x07070707).all()
    assert (tail[:, 1] == 0).all()
    tail[1, 1, 3] = -1
    assert (whole[1, 1, 32 + 24 : 32 + 28] == 0xFF).all()


def test_torch_sees_the_arena() -> None:
    torch = pytest.importorskip("torch")
    _, _, arena = make_arena()
    arena.commit([(1, 3)])
    for name in TORCH_TYPES:
        dtype = getattr(torch, name)
        items = PAGE // dtype.itemsize
        tensor = torch.from_dlpack(arena.dlpack([3, items], [items, 1], name))
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert tensor.data_ptr() == arena.base
        tensor[1:3].view(torch.uint8).fill_(0)
        tensor[2, 5] = 1
        assert tensor[1:3].to(torch.float32).sum() == 1
    strided = torch.from_dlpack(arena.dlpack([4, 3], [1, PAGE // 2], "float16"))
    assert strided.stride() == (1, PAGE // 2)


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "offset"),
    [
        ([16 * PAGE + 1], [1], "uint8", 0),
        ([16 * PAGE], [1], "uint8", 1),
        ([1], [1], "uint8", -1),
        ([1], [1], "uint8", 16 * PAGE),
        ([2], [16 * PAGE], "uint8", 0),
        ([2, 2], [1], "uint8", 0),
        ([-1], [1], "uint8", 0),
        ([2], [-1], "uint8", 10),
        ([2], [2**62], "int64", 0),
        ([2**62], [2**62], "int64", 0),
        ([2**63 - 1] * 3, [2**63 - 1] * 3, "int64", 2**63 - 1),
        ([1], [1], "uint7", 0),
    ],
)
def test_views_stay_inside(shape: list[int], strides: list[int], dtype: str, offset: int) -> None:
    _, _, arena = make_arena()
    with pytest.raises(ValueError, match=r"arena|shape|dtype"):
        arena.dlpack(shape, strides, dtype, offset)


def test_the_largest_and_the_empty_view() -> None:
    _, _, arena = make_arena()
    assert np.from_dlpack(arena.dlpack([2 * PAGE], [1], "int64")).nbytes == 16 * PAGE
    assert np.from_dlpack(arena.dlpack([0, 5], [5, 1], "int64", 16 * PAGE)).size == 0


def test_an_unmapped_block_faults() -> None:
    program = """
        from kvcached_core._core import Arena, Geometry, HostBackend, PagePool
        import numpy as np

        backend = HostBackend("unit", 1 << 20)
        arena = Arena(backend, PagePool(backend, 65536), Geometry(65536, 65536, 4))
        blocks = np.from_dlpack(arena.dlpack([4, 65536], [65536, 1], "uint8"))
        arena.commit([(1, 2)])
        blocks[1] = 1
        arena.decommit([(1, 2)])
        blocks[0] = 1
        print("alive", flush=True)
        print(blocks[1, 0])
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert ran.stdout == "alive\n"
    assert ran.returncode == -11


def test_what_is_in_use_stays_alive() -> None:
    backend, pool, arena = make_arena()
    arena.commit([(1, 2)])
    view = np.from_dlpack(arena.dlpack([2 * PAGE], [1], "uint8"))
    del pool, arena
    gc.collect()
    view[PAGE:] = 3  # would fault
    assert backend.physical_bytes == 2 * PAGE
    del view
    gc.collect()
    assert backend.physical_bytes == 0

    _, _, arena = make_arena()
    mapper = Mapper(arena)
    del arena
    gc.collect()
    mapper.commit_now([(1, 3)])
    mapper.stop()


def test_the_ledger_follows(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger" / "host-unit"), CAPACITY)
    member = ledger.join("engine")
    backend = HostBackend("unit", CAPACITY)
    pool = PagePool(backend, PAGE, 2 * PAGE, on_change=member)
    arena = Arena(backend, pool, Geometry(PAGE, PAGE, 16))
    assert member.info().committed == PAGE
    arena.commit([(1, 5)])
    assert member.info().committed == 5 * PAGE
    arena.decommit([(1, 5)])
    assert pool.ready_bytes == 2 * PAGE
    assert member.info().committed == 3 * PAGE  # ready pages are held too
    assert pool.trim_idle(60.0) == 0
    assert pool.trim(PAGE) == PAGE
    assert pool.trim_idle(0.0) == PAGE
    assert member.info().committed == PAGE == pool.held_bytes
    assert (pool.creates, pool.destroys) == (5, 4)
    del arena, pool
    gc.collect()
    assert member.info().committed == 0


def test_the_lease_shrinks_by_what_was_freed(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger" / "host-unit"), CAPACITY)
    member = ledger.join("engine")
    assert member.lease(5 * PAGE)
    backend = HostBackend("unit", CAPACITY)
    pool = PagePool(backend, PAGE, 0, on_change=member)
    arena = Arena(backend, pool, Geometry(PAGE // 2, PAGE, 16))
    mapper = Mapper(arena, on_freed=member)
    mapper.commit_now([(2, 10)])
    assert member.info().leased == 5 * PAGE
    mapper.decommit_later([(3, 8)])  # two whole pages, and half of one
    mapper.drain()
    assert member.info().leased == 3 * PAGE == member.info().committed


def test_mapper_in_the_background() -> None:
    backend = HostBackend("unit", CAPACITY)
    slow = FaultyBackend(backend)
    arena = Arena(slow, PagePool(slow, PAGE), Geometry(PAGE, PAGE, 16))
    mapper = Mapper(arena)
    slow.set_latency("map", 20_000)
    began = time.monotonic()
    mapper.commit_ahead([(1, 4)])
    assert time.monotonic() - began < 0.05
    assert mapper.pending == 1
    mapper.wait_commits()
    assert arena.is_committed(3)
    mapper.decommit_later([(1, 2)])
    mapper.drain()
    assert not arena.is_committed(1)
    assert slow.calls("fence") == 1
    mapper.stop()
    with pytest.raises(VmmError, match="stopped"):
        mapper.commit_ahead([(1, 2)])


def test_faults_on_demand() -> None:
    backend = HostBackend("unit", CAPACITY)
    faulty = FaultyBackend(backend)
    arena = Arena(faulty, PagePool(faulty, PAGE), Geometry(PAGE, PAGE, 16))
    faulty.fail(2, "driver", "map")
    with pytest.raises(VmmError, match="injected failure of map"):
        arena.commit([(1, 4)])
    faulty.fail(1, "out_of_memory", "create")
    assert not arena.commit([(1, 4)])
    faulty.fail(1)
    faulty.clear()
    assert arena.commit([(1, 4)])
    assert faulty.calls("map") == 6
    assert faulty.calls() > faulty.calls("map")
    for op, code in (("nothing", "driver"), ("map", "nothing")):
        with pytest.raises(ValueError, match="no such"):
            faulty.fail(1, code, op)  # type: ignore[arg-type]


def _slow_arena(op: str) -> tuple[FaultyBackend, Arena]:
    backend = HostBackend("unit", CAPACITY)
    slow = FaultyBackend(backend)
    arena = Arena(slow, PagePool(slow, PAGE), Geometry(PAGE, PAGE, 16))
    arena.commit([(8, 9)])
    slow.set_latency(op, 200_000)  # type: ignore[arg-type]
    return slow, arena


def _call(name: str, slow: FaultyBackend, arena: Arena) -> Any:
    mapper = Mapper(arena)
    match name:
        case "commit":
            return lambda: arena.commit([(1, 2)])
        case "decommit":
            return lambda: arena.decommit([(8, 9)])
        case "close":
            return arena.close
        case "fence":
            return slow.fence
        case "memory_info":
            return slow.memory_info
        case "commit_now":
            return lambda: mapper.commit_now([(1, 2)])
        case "drain":
            mapper.decommit_later([(8, 9)])
            return mapper.drain
        case "wait_commits":
            mapper.commit_ahead([(1, 2)])
            return mapper.wait_commits
        case _:
            mapper.commit_ahead([(1, 2)])
            return mapper.stop


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("commit", "map"),
        ("decommit", "unmap"),
        ("close", "unmap"),
        ("fence", "fence"),
        ("memory_info", "memory_info"),
        ("commit_now", "map"),
        ("drain", "unmap"),
        ("wait_commits", "map"),
        ("stop", "map"),
    ],
)
def test_the_gil_is_free_meanwhile(name: str, op: str) -> None:
    call = _call(name, *_slow_arena(op))
    stop = threading.Event()
    ticks: list[float] = []

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.monotonic()
    call()
    ended = time.monotonic()
    stop.set()
    thread.join()
    assert ended - began > 0.15
    assert sum(began < at < ended for at in ticks) > 5
