# SPDX-License-Identifier: Apache-2.0
"""Members that use a ledger as engines do, without rest, until somebody kills them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from kvcached_core._core import HostBackend, Ledger, LedgerRefused, Member, VmmError
from kvcached_core.plan import ArenaShape, StepOps, WorkerBinding
from kvcached_core.worker import WorkerArena

PAGE = 64 << 10
BLOCKS = 64


def account_only(path: Path, seed: int) -> None:
    """A scheduler's calls, one after the other: the kill falls into any of them."""
    rng = random.Random(seed)
    member = _join(Ledger(path), rng)
    held = 0
    while True:
        choice = rng.randrange(8)
        if choice <= 2:
            more = rng.randrange(1, 16) * PAGE
            held += more if member.lease(more) else 0
        elif choice == 3:
            less = rng.randrange(held // PAGE + 1) * PAGE
            member.release(less)
            held -= less
        elif choice == 4:
            member.set_demand(rng.randrange(32) * PAGE, rng.randrange(4))
        elif choice == 5:
            parked = rng.randrange(held + 1)
            member.set_parked(parked)
            member.set_cached(held - parked)
        elif choice == 6:
            _answer(member)
        else:
            member.wait_bell(member.bell, rng.randrange(3))


def _answer(member: Member) -> None:
    member.ask()
    policy = member.policy()
    member.observe(policy.version)
    member.touch()
    member.count("shortages")
    member.time("reclaim", 1e-4)


def with_pages(path: Path, seed: int) -> None:
    """A scheduler and a worker in one process, with host memory behind what is leased."""
    rng = random.Random(seed)
    ledger = Ledger(path)
    member = _join(ledger, rng)
    shape = ArenaShape(num_blocks=BLOCKS, block_bytes=PAGE, page_bytes=PAGE)
    while not member.lease(PAGE):
        member.wait_bell(member.bell, 5)
    binding = WorkerBinding(
        shape, ledger.path, ledger.capacity, 0, member.slot, member.generation, retry_ms=1000
    )
    arena = WorkerArena(HostBackend("0", ledger.capacity), binding)
    free, used = set(range(1, BLOCKS)), set[int]()
    while True:
        blocks = rng.sample(sorted(free), min(len(free), rng.randrange(1, 8)))
        if blocks and member.lease(len(blocks) * PAGE):
            arena.apply(StepOps([(block, block + 1) for block in blocks], [], []))
            free -= set(blocks)
            used |= set(blocks)
        else:
            member.set_demand(len(blocks) * PAGE, 1)
        blocks = rng.sample(sorted(used), rng.randrange(len(used) + 1))
        arena.apply(StepOps([], [], [(block, block + 1) for block in sorted(blocks)]))
        free |= set(blocks)
        used -= set(blocks)
        _answer(member)


def _join(ledger: Ledger, rng: random.Random) -> Member:
    guarantee = rng.choice((0, 0, 4)) * PAGE
    while True:
        try:
            return ledger.join(
                f"soak-{rng.randrange(1000)}",
                guarantee=guarantee,
                weight=rng.randrange(1, 200),
                priority=rng.randrange(3),
            )
        except LedgerRefused:
            guarantee = 0


def holder(path: Path, amount: int) -> None:
    """Holds `amount`, says so, and its own process id, and waits."""
    import os

    member = Ledger(path).join("holder")
    assert member.lease(amount)
    print(member.slot, member.generation, os.getpid(), flush=True)
    sys.stdin.read()


def quietly(target: str, path: Path, seed: int) -> None:
    """Runs a member; the one way to end is a kill, so any exception is a failure of the test."""
    try:
        {"account": account_only, "pages": with_pages}[target](path, seed)
    except VmmError as error:
        Path(f"{path}.failed-{seed}").write_text(repr(error))
        raise


if __name__ == "__main__":
    holder(Path(sys.argv[1]), int(sys.argv[2]))
