# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on a real GPU, with real tensors. Skipped where there is none."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcached_core._core import Arena, CudaBackend, Geometry, Mapper, PagePool, VmmError
from kvcached_core.sleep.compare import PIECE, CompareOnDevice, Part, Piece
from kvcached_core.sleep.host_file import HostFile
from kvcached_core.usage import DeviceUsage

MIB = 1 << 20


@pytest.fixture(scope="module")
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.version.cuda is None:
        pytest.skip("no CUDA GPU")
    torch.zeros(1, device="cuda")
    return torch


@pytest.fixture
def backend(torch: Any) -> CudaBackend:
    return CudaBackend(0)


def test_the_key_is_nvmls(backend: CudaBackend) -> None:
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    count = pynvml.nvmlDeviceGetCount()
    uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    assert backend.device_key.removeprefix("gpu-") in uuids


def test_nvml_counts_as_cuda_does(backend: CudaBackend) -> None:
    usage = DeviceUsage(backend.device_key)
    free, total = backend.memory_info()
    assert usage.total_bytes() == pytest.approx(total, abs=4 * MIB)
    # Others may allocate in between.
    assert usage.total_bytes() - usage.used_bytes() == pytest.approx(free, abs=64 * MIB)


def test_memory_comes_and_goes(torch: Any, backend: CudaBackend) -> None:
    page = 16 * MIB
    assert page % backend.granularity == 0
    free_before, total = backend.memory_info()
    pool = PagePool(backend, page)
    arena = Arena(backend, pool, Geometry(6 * MIB, page, 200, 2))
    for _ in range(3):
        assert arena.commit([(1, 100), (120, 130)])
        assert free_before - backend.memory_info()[0] == arena.committed_bytes
        arena.decommit([(1, 40), (120, 130)])
        assert free_before - backend.memory_info()[0] == arena.committed_bytes
        arena.decommit([(40, 100)])
    assert not Arena(backend, pool, Geometry(page, page, 2 * total // page)).commit(
        [(1, 2 * total // page)]
    )
    arena.close()
    assert backend.memory_info() == (free_before, total)


@pytest.mark.parametrize("zero", [False, True])
def test_kernels_use_the_pages(torch: Any, backend: CudaBackend, zero: bool) -> None:
    page = 2 * MIB
    pool = PagePool(backend, page, 64 * page)
    arena = Arena(backend, pool, Geometry(3 * MIB, page, 64), zero_recycled=zero)
    words = 3 * MIB // 4
    blocks = torch.from_dlpack(arena.dlpack([64, words], [words, 1], "int32"))
    assert blocks.device == torch.device("cuda", 0)
    assert arena.commit([(1, 20)])
    blocks[2:20] = torch.arange(2, 20, device="cuda", dtype=torch.int32)[:, None]
    assert (blocks[1] == 0).all()
    mapper = Mapper(arena)
    mapper.decommit_later([(1, 10)])
    mapper.drain()
    for block in range(10, 20):
        assert (blocks[block] == block).all()
    mapper.commit_now([(30, 36)])
    assert bool((blocks[30:36] == 0).all()) == zero
    assert pool.creates < 40


def test_the_fence_waits_for_every_stream(torch: Any, backend: CudaBackend) -> None:
    stream = torch.cuda.Stream()
    done = torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        done.record()
    assert not done.query()
    backend.fence()
    assert done.query()


def test_commits_do_not_wait_for_kernels(torch: Any, backend: CudaBackend) -> None:
    page = 2 * MIB
    pool = PagePool(backend, page, 64 * page)
    arena = Arena(backend, pool, Geometry(page, page, 64), zero_recycled=True)
    arena.commit([(1, 9)])
    arena.decommit([(1, 9)])
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    done.record()
    began = time.monotonic()
    assert arena.commit([(1, 9)])  # recycled and zeroed, on a stream of its own
    spent = time.monotonic() - began
    assert not done.query(), f"a commit of 8 pages took {spent:.3f} s"
    torch.cuda.synchronize()


def test_the_callers_device_stays_current(torch: Any, backend: CudaBackend) -> None:
    before = torch.cuda.current_device()
    arena = Arena(backend, PagePool(backend, 2 * MIB), Geometry(2 * MIB, 2 * MIB, 4))
    arena.commit([(1, 3)])
    assert torch.cuda.current_device() == before
    if torch.cuda.device_count() > 1:
        with torch.cuda.device(1):
            arena.decommit([(1, 3)])
            assert torch.cuda.current_device() == 1


def test_copies_are_compared_on_the_device(torch: Any, backend: CudaBackend) -> None:
    page, pages = 2 * MIB, PIECE // (2 * MIB) + 3  # a piece and a part of one
    arena = Arena(backend, PagePool(backend, page), Geometry(page, page, 1 + pages))
    assert arena.commit([(1, 1 + pages)])
    words = page // 8
    memory = torch.from_dlpack(arena.dlpack([1 + pages, words], [words, 1], "int64"))
    memory[1:] = torch.randint(1 << 40, (pages, words), device="cuda")
    split = 1 + pages // 2
    parts = [
        Part(arena.base + page, (split - 1) * page),
        Part(arena.base + split * page, (1 + pages - split) * page),
    ]
    # Memory that a device can use must not be a disk's.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = HostFile.create(Path(folder), pages * page)
        backend.pin(file.address, file.num_bytes)
        backend.fence()
        backend.download(file.address, arena.base + page, file.num_bytes)
        backend.finish_copies()
        asked: list[Sequence[Part]] = []

        def otherwise(parts: Sequence[Part], copy: int, most: int) -> list[Piece] | None:
            asked.append(parts)
            return [] if copy == file.address and most == page else None

        compare = CompareOnDevice(backend, otherwise)
        assert compare(parts, file.address, 0) == []
        for block, word in ((1, 0), (split, 0), (pages, words - 1)):
            memory[block, word] ^= 1 << 56
            offset = (block - 1) * page
            found = [Piece(arena.base + block * page, offset, page)]
            assert compare(parts, file.address, page) == found
            assert compare(parts, file.address, page - 1) is None
            memory[block, word] ^= 1 << 56
        memory[1:3] += 1
        assert compare(parts, file.address, 2 * page) == [Piece(arena.base + page, 0, 2 * page)]
        memory[1:3] -= 1
        assert compare(parts, file.address, 0) == []
        assert not asked
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-9)
        try:
            assert compare(parts, file.address, page) == []
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert asked == [parts]
        backend.unpin(file.address)
        file.close()
    del memory
    arena.close()


def test_no_such_device(torch: Any) -> None:
    with pytest.raises(VmmError, match="not visible"):
        CudaBackend(torch.cuda.device_count())
