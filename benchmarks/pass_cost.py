# SPDX-License-Identifier: Apache-2.0
"""What a scheduling pass costs an engine on the CPU when nobody wants anything of it.

    python benchmarks/pass_cost.py [--core FOLDER]

The scheduler half alone, called as the patches of vLLM (with its free queue) and SGLang (from the
engine's queues to what the ranks are told) call it, with the ledger of one member: no engine, no
driver, no worker. CPU time of the thread, so that neighbours on the machine count little. Another
kvcached_core is measured by naming the folder it is in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PASSES, REPEATS = 300, 7
BLOCKS, PAGE, BLOCK = 20_000, 16 << 20, 2 << 20  # of an 8B model


def half(path: Path) -> Any:
    """A scheduler half, alone on its ledger."""
    from kvcached_core import ArenaShape, ElasticScheduler, Ledger
    from kvcached_core.accounts import Account

    ledger = Ledger(str(path), 64 << 30, 0)
    account = Account(ledger, ledger.join("engine"), (PAGE,), BLOCK)
    shape = ArenaShape(BLOCKS, BLOCK, PAGE)
    return ElasticScheduler(BLOCKS, [shape], [account], parked_bytes=1 << 30)


def time_of(one: Callable[[], object]) -> float:
    """Microseconds of a pass, the best of some runs."""
    for _ in range(PASSES):
        one()
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(PASSES):
            one()
        best = min(best, (time.thread_time() - begin) / PASSES)
    return best * 1e6


def vllm(path: Path, batch: int, blocks: int) -> float:
    """With so many requests, when a pass takes so many blocks and frees them."""
    from tests.support.block_pool import Block, LinkedList

    scheduler = half(path)
    queue = scheduler.free_queue([Block(i) for i in range(BLOCKS)], LinkedList(), lambda _: None)
    queue.popleft()
    running: list[Any] = [_Request() for _ in range(batch)]

    def one() -> None:
        scheduler.begin_pass(running, ())
        for _ in running:
            if hasattr(queue, "lacks"):
                queue.lacks(0)
            else:  # what the patches did before
                _ = queue.num_free_blocks
            queue.ensure(0)
        taken = queue.popleft_n(blocks) if queue.ensure(blocks) else []
        scheduler.take_ops(batch)
        queue.usage()
        scheduler.stats()
        queue.prepend_n(taken)

    found = time_of(one)
    scheduler.close()
    return found


def sglang(path: Path, batch: int, blocks: int) -> float:
    """The same, where as many requests begin a block."""
    from kvcached_core.lockstep import Leader
    from kvcached_core.sglang_load import load_of

    scheduler = half(path)
    leader = Leader(scheduler, 1)
    requests = [SimpleNamespace(kv_committed_len=300 if i >= blocks else 304) for i in range(batch)]
    engine = SimpleNamespace(
        chunked_req=None,
        running_batch=SimpleNamespace(reqs=requests),
        last_batch=None,
        waiting_queue=[],
        chunked_prefill_size=8192,
    )

    def one() -> None:
        load = load_of(engine, (), 16)
        assert load is not None
        leader.plan(load)
        scheduler.allocator.free(scheduler.allocator.allocate(blocks))

    found = time_of(one)
    scheduler.close()
    return found


class _Request:
    num_tokens = num_computed_tokens = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a quiet scheduling pass.")
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--core", type=Path, default=here, help="folder with kvcached_core")
    args = parser.parse_args()
    sys.path[:0] = [str(args.core.resolve()), str(here)]
    with tempfile.TemporaryDirectory(prefix="kvcached-pass-", dir="/dev/shm") as name:
        for engine in (vllm, sglang):
            for batch, blocks in ((1, 0), (64, 0), (64, 4)):
                found = engine(Path(name) / f"{engine.__name__}-{batch}-{blocks}", batch, blocks)
                what = f"{engine.__name__}, {batch} requests, {blocks} blocks taken"
                print(f"{what}: {found:.1f} us a pass")


if __name__ == "__main__":
    main()
