# SPDX-License-Identifier: Apache-2.0
"""An allocator called from Python, ours or the public kvcached's: a line of JSON a measurement.

Run by `alloc_microbench.py`, under callgrind and without it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

sys.path.append(str(Path(__file__).resolve().parents[2]))

POOL, SIZES = 8192, (1, 4, 16, 64, 256, 1024)
BLOCK, PAGE = 2 << 20, 16 << 20


class Blocks(Protocol):
    """What both allocators can do."""

    def take(self, n: int) -> list[int]: ...
    def give(self, blocks: list[int]) -> None: ...
    def take_unmapped(self, n: int) -> list[int]:
        """As `take`, where nothing is mapped yet."""

    def give_all(self, blocks: list[int]) -> None:
        """As `give`, and unmaps everything."""


class Ours:
    def __init__(self) -> None:
        from kvcached_core._core import BlockAllocator, Geometry

        self._blocks = BlockAllocator(POOL, [Geometry(BLOCK, PAGE, POOL)])
        self.take, self.give = self._blocks.allocate, self._blocks.free

    def map_all(self) -> None:
        self._blocks.grow(POOL - 1)

    def take_unmapped(self, n: int) -> list[int]:
        self._blocks.grow(n)
        return self._blocks.allocate(n)

    def give_all(self, blocks: list[int]) -> None:
        self._blocks.free(blocks)
        self._blocks.shrink(1 << 62)


class Public:
    """Its `KVCacheManager` with its defaults; what it tells its workers goes nowhere."""

    def __init__(self) -> None:
        import kvcached.tp_ipc_util as ipc

        # Mapping is the workers' business: the messages to them, and the driver, cost nothing.
        ipc.broadcast_kv_tensors_created = lambda *_, **__: True
        ipc.broadcast_map_to_kv_tensors = lambda *_, **__: None
        ipc.broadcast_unmap_from_kv_tensors = lambda *_, **__: None
        from kvcached.kv_cache_manager import KVCacheManager

        # Llama 3.1 8B: 2 KiB of K, and as much of V, for a token and a layer.
        self.manager = KVCacheManager(
            POOL, 16, 2048, 32, world_size=2, reserve_null_block=True, num_kv_buffers=2
        )
        self.take, self.give = self.manager.alloc, self.manager.free

    def map_all(self) -> None:
        pass  # It maps as it takes and keeps what it keeps.

    def take_unmapped(self, n: int) -> list[int]:
        return self.manager.alloc(n)

    def give_all(self, blocks: list[int]) -> None:
        self.manager.free(blocks)
        self.manager.trim()


class Probe:
    """Times calls, or lets callgrind count them."""

    def __init__(self, marks: Any, rounds: int) -> None:
        self._marks, self._rounds = marks, rounds

    def __call__(
        self, name: str, call: Callable[[Any], Any], before: Callable[[], Any], after: Any = None
    ) -> None:
        """Measures `call(before())`, with `after(result)` behind it."""
        toggle, clock, times = self._marks.toggle, time.perf_counter_ns, []
        self._marks.zero()
        for _ in range(self._rounds):
            given = before()
            begin = clock()
            toggle()
            result = call(given)
            toggle()
            times.append(clock() - begin)
            if after is not None:
                after(result)
        self._marks.dump(name.encode())
        row = {"name": name, "calls": len(times), "median_s": statistics.median(times) / 1e9}
        print(json.dumps(row), flush=True)


def measure(blocks: Any, probe: Probe, sizes: tuple[int, ...]) -> None:
    probe("nothing", lambda _: None, lambda: None)
    blocks.map_all()
    for n in sizes:
        probe(f"take mapped {n}", blocks.take, lambda n=n: n, blocks.give)
        probe(f"give mapped {n}", blocks.give, lambda n=n: blocks.take(n))
    # A pool in use, with holes everywhere.
    live = blocks.take(POOL - 64)
    random.Random(7).shuffle(live)
    half = live[: len(live) // 2]
    blocks.give(half)
    for n in sizes:
        probe(f"take half {n}", blocks.take, lambda n=n: n, blocks.give)
        probe(f"give half {n}", blocks.give, lambda n=n: blocks.take(n))
    blocks.give_all(live[len(live) // 2 :])
    for n in sizes:
        probe(f"take unmapped {n}", blocks.take_unmapped, lambda n=n: n, blocks.give_all)
        probe(f"give unmapped {n}", blocks.give_all, lambda n=n: blocks.take_unmapped(n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("which", choices=("ours", "public"))
    parser.add_argument("--marks", required=True, help="marks.c, compiled")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    marks = ctypes.CDLL(args.marks)
    blocks = Ours() if args.which == "ours" else Public()
    marks.begin()
    measure(blocks, Probe(marks, args.rounds), SIZES)
    # Its threads wait for each other at exit; nothing is left to do.
    sys.stdout.flush()
    if args.which == "public":
        import os

        os._exit(0)


if __name__ == "__main__":
    main()
