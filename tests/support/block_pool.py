# SPDX-License-Identifier: Apache-2.0
"""An engine reduced to its block pool: what the scheduler half sees of one, over a real ledger."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcached_core import ArenaShape, ElasticScheduler, Ledger
from kvcached_core.accounts import Account
from kvcached_core.free_queue import ElasticFreeQueue

PAGE = 1 << 16


@dataclass(eq=False)
class Block:
    """An engine's block object, as far as the queue looks at it."""

    block_id: int
    ref_cnt: int = 0
    block_hash: object | None = None
    is_null: bool = False
    prev_free_block: Any = None
    next_free_block: Any = None


@dataclass
class LinkedList:
    """The engine's own free list, rebuilt over a Python list: order is what matters."""

    blocks: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fake_free_list_head = Block(-1)
        self.fake_free_list_tail = Block(-1)
        self._relink()

    def _relink(self) -> None:
        ends = [self.fake_free_list_head, *self.blocks, self.fake_free_list_tail]
        for block, after in itertools.pairwise(ends):
            block.next_free_block = after

    @property
    def num_free_blocks(self) -> int:
        return len(self.blocks)

    def popleft(self) -> Block:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Block]:
        taken, self.blocks = self.blocks[:n], self.blocks[n:]
        assert len(taken) == n
        self._relink()
        return taken

    def remove(self, block: Block) -> None:
        self.blocks.remove(block)
        self._relink()

    def append(self, block: Block) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[Block]) -> None:
        self.blocks += blocks
        self._relink()

    def get_all_free_blocks(self) -> list[Block]:
        return list(self.blocks)


class Engine:
    """An engine core reduced to its block pool's calls."""

    def __init__(
        self,
        ledger: Ledger | None,
        num_blocks: int,
        block_bytes: int,
        name: str = "engine",
        join: dict[str, Any] | None = None,
        **policy: Any,
    ) -> None:
        shape = ArenaShape(num_blocks, block_bytes, PAGE)
        self.accounts = []
        if ledger is not None:
            member = ledger.join(name, **(join or {}))
            self.accounts = [Account(ledger, member, (PAGE,), block_bytes)]
        self.scheduler = ElasticScheduler(num_blocks, [shape], self.accounts, **policy)
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.evicted: list[int] = []
        self.preempt = 0
        self.queue: ElasticFreeQueue = self.scheduler.free_queue(
            self.blocks, LinkedList(), self._evict
        )
        null = self.queue.popleft()
        assert null.block_id == 0
        null.is_null = True

    def _evict(self, block: Block) -> None:
        block.block_hash = None
        self.evicted.append(block.block_id)

    def take(self, n: int, beside: int = 0) -> list[Block] | None:
        if not self.queue.ensure(n):
            return None
        taken = self.queue.popleft_n(n, beside)
        for block in taken:
            if block.block_hash is not None:
                self._evict(block)
            block.ref_cnt = 1
        return taken

    def free(self, blocks: list[Block], cached: bool = False) -> None:
        for block in blocks:
            block.ref_cnt = 0
            block.block_hash = object() if cached else None
        (self.queue.append_n if cached else self.queue.prepend_n)(blocks)

    def apply(self, running: Sequence[Any] = (), waiting: Sequence[Any] = ()) -> tuple[int, int]:
        """A pass without allocations, and what workers do after it: release what it decommits.

        Returns the number of blocks committed and decommitted.
        """
        self.preempt = self.scheduler.begin_pass(running, waiting)
        return self.finish()

    def finish(self) -> tuple[int, int]:
        """The end of a pass that was begun elsewhere."""
        ops = self.scheduler.take_ops()
        for account in self.accounts:
            pages = self.scheduler.allocator.committed_pages(0)
            surplus = account.member.info().leased - pages * PAGE
            assert surplus >= 0
            account.member.release(surplus)
        count = [sum(b - a for a, b in r) for r in (ops.commit, ops.decommit)]
        return count[0], count[1]
