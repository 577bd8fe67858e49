# SPDX-License-Identifier: Apache-2.0
"""What a scheduling pass costs an engine on the CPU when nobody wants anything of it.

    python benchmarks/pass_cost.py [--core FOLDER]

The scheduler half and its free queue alone, called as the vLLM patches call them, with the ledger
of one member: no engine, no driver, no worker. CPU time of the thread, so that neighbours on the
machine count little. Another kvcached_core is measured by naming the folder it is in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PASSES, REPEATS = 300, 7
BLOCKS, PAGE, BLOCK = 20_000, 16 << 20, 2 << 20  # of an 8B model


def cost(folder: Path, batch: int, blocks: int) -> float:
    """Microseconds of a pass with so many requests, that takes so many blocks and frees them."""
    from kvcached_core import ArenaShape, ElasticScheduler, Ledger
    from kvcached_core.accounts import Account
    from tests.support.block_pool import Block, LinkedList

    path = folder / f"{batch}-{blocks}.ledger"
    ledger = Ledger(str(path), 64 << 30, 0)
    account = Account(ledger, ledger.join("engine"), (PAGE,), BLOCK)
    shape = ArenaShape(BLOCKS, BLOCK, PAGE)
    scheduler = ElasticScheduler(BLOCKS, [shape], [account], parked_bytes=1 << 30)
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

    for _ in range(PASSES):
        one()
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(PASSES):
            one()
        best = min(best, (time.thread_time() - begin) / PASSES)
    scheduler.close()
    return best * 1e6


class _Request:
    num_tokens = num_computed_tokens = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a quiet scheduling pass.")
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--core", type=Path, default=here, help="folder with kvcached_core")
    args = parser.parse_args()
    sys.path[:0] = [str(args.core.resolve()), str(here)]
    with tempfile.TemporaryDirectory(prefix="kvcached-pass-", dir="/dev/shm") as name:
        for batch, blocks in ((1, 0), (64, 0), (64, 4)):
            found = cost(Path(name), batch, blocks)
            print(f"{batch} requests, {blocks} blocks taken: {found:.1f} us a pass")


if __name__ == "__main__":
    main()
