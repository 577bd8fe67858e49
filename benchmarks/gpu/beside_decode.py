# SPDX-License-Identifier: Apache-2.0
"""What a decode loop loses while pages are given back, or taken, beside it.

The loop replays a CUDA graph of about a decode step's length and launches the next one before it
reads the last one's result, as engines do. Meanwhile a Mapper moves pages. What is counted is the
time the steps took beyond those of an undisturbed loop.

    python benchmarks/gpu/beside_decode.py --gib 16 --page-mib 2 16
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

LAYERS = 32
KERNELS = 6


class DecodeLoop:
    """Steps of a batch of `batch` rows through `LAYERS` layers of an 8B shape."""

    def __init__(self, batch: int) -> None:
        import torch

        self.torch = torch
        up = [torch.randn(4096, 14336, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        state = torch.randn(batch, 4096, dtype=torch.bfloat16, device="cuda")

        def step() -> Any:
            x = state
            for weight in up:
                for _ in range(KERNELS // 2):
                    x = (x @ weight) @ weight.T * 1e-4
            return x.sum()

        step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step()
        self.host = torch.empty(2, dtype=self.result.dtype, pin_memory=True)
        self.done = [torch.cuda.Event(), torch.cuda.Event()]

    def run(self, go_on: Callable[[int], bool]) -> list[float]:
        """Seconds from the end of each step to the end of the next."""
        ends: list[float] = []
        step = 0
        while go_on(step):
            self.graph.replay()
            self.host[step % 2].copy_(self.result, non_blocking=True)
            self.done[step % 2].record()
            if step:
                self.done[(step - 1) % 2].synchronize()
                ends.append(time.perf_counter())
            step += 1
        self.torch.cuda.synchronize()
        return [b - a for a, b in itertools.pairwise(ends)]


def lost(steps: list[float], usual: float) -> dict[str, Any]:
    extra = [1e3 * (step - usual) for step in steps]
    return {
        "steps": len(steps),
        "lost_ms": round(sum(extra), 1),
        "worst_ms": round(max(extra), 2),
        "slowed_steps": sum(e > 0.05 * 1e3 * usual for e in extra),
    }


def measure(loop: DecodeLoop, gib: float, page_bytes: int) -> dict[str, Any]:
    """Pages that come and go in the background, and on the loop's own thread."""
    from kvcached_core._core import Arena, CudaBackend, Geometry, Mapper, PagePool

    pages = int(gib * 2**30) // page_bytes
    backend = CudaBackend(0)
    arena = Arena(backend, PagePool(backend, page_bytes), Geometry(page_bytes, page_bytes, pages))
    mapper = Mapper(arena)
    blocks = [(1, pages)]
    usual = statistics.median(loop.run(lambda step: step < 200))

    def until_idle(step: int) -> bool:
        return step < 20 or mapper.pending > 0

    report: dict[str, Any] = {"page_mib": page_bytes >> 20, "pages": pages}
    report["step_ms"] = round(1e3 * usual, 3)
    begin = time.perf_counter()
    mapper.commit_ahead(blocks)
    report["commit_background"] = lost(loop.run(until_idle), usual)
    report["commit_background"]["took_ms"] = round(1e3 * (time.perf_counter() - begin), 1)
    begin = time.perf_counter()
    mapper.decommit_later(blocks)
    report["decommit"] = lost(loop.run(until_idle), usual)
    report["decommit"]["took_ms"] = round(1e3 * (time.perf_counter() - begin), 1)

    # One job for every page, each of which waits for the device first.
    few = min(pages - 1, 64)
    mapper.commit_ahead([(1, 1 + few)])
    mapper.drain()
    for block in range(1, 1 + few):
        mapper.decommit_later([(block, block + 1)])
    report["decommit_one_by_one"] = lost(loop.run(until_idle), usual)

    # As an engine that grows by some blocks in every pass, before it launches the step.
    at, inline = 1, []
    per_step = max(1, pages // 200)

    def grow(step: int) -> bool:
        nonlocal at
        if at >= pages:
            return False
        begin = time.perf_counter()
        end = min(at + per_step, pages)
        mapper.commit_now([(at, end)])
        inline.append(time.perf_counter() - begin)
        at = end
        return True

    report["commit_now"] = lost(loop.run(grow), usual)
    report["commit_now"]["in_call_ms"] = round(1e3 * sum(inline), 1)
    mapper.stop()
    arena.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--page-mib", type=int, nargs="+", default=[2, 16])
    args = parser.parse_args()
    loop = DecodeLoop(args.batch)
    for mib in args.page_mib:
        print(json.dumps(measure(loop, args.gib, mib << 20)), flush=True)


if __name__ == "__main__":
    main()
