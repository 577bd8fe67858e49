# SPDX-License-Identifier: Apache-2.0
"""The small SGLang with a second pool, in which requests keep only the last tokens.

A block of the first pool has a block of the second until the window has passed it, or the prefix
cache has given that up.  As in SGLang, a node of the cache may be without its windows; a request
may begin with it only if a whole window lies behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcached_core._core import BlockAllocator
from kvcached_core.tree_eviction import nodes_to_evict

from .little_sglang import Batch, LittleSglang, Node, PrefixTree, Request


class WindowTree(PrefixTree):
    """A prefix cache over both pools; itself what it keeps in the first."""

    _engine: LittleWindows

    def __init__(self, engine: LittleWindows) -> None:
        super().__init__(engine)
        self.windowless: set[int] = set()
        self.window_locks: dict[int, int] = {}
        self.windows = Windows(self, engine)

    def match(self, topic: int, most_blocks: int, now: int) -> list[Node]:
        path = super().match(topic, most_blocks, now)
        best, since = 0, 1 << 30
        for index, node in enumerate(path):
            if node.number in self.windowless:
                since = 0
            else:
                since += len(node.blocks) * self._engine.block_tokens
            if since >= self._engine.window_tokens:
                best = index + 1
        return path[:best]

    def evict(self, num_blocks: int) -> None:
        for node in self.in_order():
            if num_blocks <= 0:
                break
            if node.parent is not None:
                num_blocks -= len(node.blocks)
                self._remove(node)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return  # it went with its last child
        super()._remove(node)
        node.parent = None
        if not parent.children and not parent.locks and parent.number in self.windowless:
            self._remove(parent)

    # -- windows --------------------------------------------------------------

    def with_windows(self) -> list[Node]:
        """Nodes whose windows may go, as they would."""
        free = [
            node
            for node in self.nodes()
            if node.number not in self.windowless and not self.window_locks.get(node.number)
        ]
        return sorted(free, key=lambda node: (node.used, node.number))

    def drop_windows(self, node: Node) -> None:
        if node.children or node.locks:
            self.windowless.add(node.number)
            self._engine.free_windows(node.blocks)
        else:
            self._remove(node)

    def locked_windows(self, nodes: Sequence[Node]) -> list[Node]:
        """The last nodes of a path, as many as hold a window."""
        locked: list[Node] = []
        tokens = 0
        for node in reversed(nodes):
            if tokens >= self._engine.window_tokens:
                break
            assert node.number not in self.windowless
            locked.append(node)
            tokens += len(node.blocks) * self._engine.block_tokens
        return locked


class Windows:
    """What the prefix cache keeps in the second pool."""

    def __init__(self, tree: WindowTree, engine: LittleWindows) -> None:
        self._tree = tree
        self._engine = engine

    @property
    def num_cached(self) -> int:
        return sum(len(node.blocks) for node in self._tree.with_windows())

    def sweep(self) -> None:
        self._engine.land()

    def empty_pages(self, num_pages: int) -> None:
        nodes = self._tree.with_windows()
        blocks = [[self._engine.window_of[block] for block in node.blocks] for node in nodes]
        chosen = nodes_to_evict(self._engine.window, blocks, [-1] * len(nodes), num_pages)
        for i in chosen:
            self._tree.drop_windows(nodes[i])
        self._engine.land()

    def evict(self, num_blocks: int) -> None:
        for node in self._tree.with_windows():
            if num_blocks <= 0:
                break
            num_blocks -= len(node.blocks)
            self._tree.drop_windows(node)

    def evict_down_to(self, num_blocks: int) -> None:
        self.evict(self.num_cached - num_blocks)
        self._engine.land()


class LittleWindows(LittleSglang):
    """The scheduler of one rank of a model with sliding windows.

    Args:
        allocator: of all tokens.
        window: of windows.
        window_tokens: a request keeps so many.
        settings: as :class:`LittleSglang` takes them.
    """

    tree: WindowTree

    def __init__(
        self,
        allocator: BlockAllocator,
        window: BlockAllocator,
        window_tokens: int = 48,
        **settings: Any,
    ) -> None:
        super().__init__(allocator, **settings)
        self.window = window
        self.window_tokens = window_tokens
        self.window_of: dict[int, int] = {}
        """The second pool's block of a block of the first."""
        self.tree = WindowTree(self)
        self._freed_windows: list[list[int]] = []
        self._windows_off = 0

    # -- slots ----------------------------------------------------------------

    def free(self, blocks: list[int]) -> None:
        super().free(blocks)
        self.free_windows(blocks)

    def free_windows(self, blocks: Sequence[int]) -> None:
        gone = [self.window_of.pop(block) for block in blocks if block in self.window_of]
        if gone:
            self._freed_windows.append(gone)

    def land(self) -> None:
        super().land()
        freed, self._freed_windows = self._freed_windows, []
        for blocks in freed:
            self.window.free_array(np.unique(blocks).astype(np.int32))

    def available(self) -> int:
        return min(super().available(), self._windows_available())

    def _windows_available(self) -> int:
        self.land()
        return (self.window.num_clean - self.order.room(1).withheld_blocks) * self.block_tokens

    def _windows_evictable(self) -> int:
        return self.tree.windows.num_cached * self.block_tokens

    def _take(self, num_blocks: int) -> list[int]:
        blocks = super()._take(num_blocks)
        windows = self.window.allocate_array(num_blocks)
        self.window_of |= {block: int(w) for block, w in zip(blocks, windows, strict=True)}
        return blocks

    def _evict_for(self, tokens: int) -> None:
        short = tokens - super().available()
        if short > 0:
            self.tree.evict(-(-short // self.block_tokens))
        short = tokens - self._windows_available()
        if short > 0:
            self.tree.windows.evict(-(-short // self.block_tokens))

    # -- a pass ---------------------------------------------------------------

    def _prefill(self) -> Batch | None:
        self._windows_off = 0
        return super()._prefill()

    def _total_left(self) -> float:
        reachable = self.order.room(0).reachable_blocks * self.block_tokens
        free = super().available()
        return free + self._evictable() + reachable - self._total_off

    def _now_left(self) -> int:
        full = super().available() + self._evictable()
        windows = self._windows_available() + self._windows_evictable()
        return min(full, windows) - self._now_off

    def _windows_left(self) -> int:
        reachable = self.order.room(1).reachable_blocks * self.block_tokens
        free = self._windows_available() + self._windows_evictable()
        return free + reachable - self._windows_off

    def _budget(self, tokens: int) -> int:
        chunk = tokens if self._chunk_left is None else min(tokens, self._chunk_left)
        return max(chunk, self.window_tokens) + self.block_tokens

    def _fits_beside(self, tokens: int) -> bool:
        return self._budget(tokens) < self._windows_left()

    def _beside_left(self) -> int:
        left = self._windows_left() - self.block_tokens
        return left // self.block_tokens * self.block_tokens

    def _charge(self, request: Request, tokens: int, to_come: int) -> None:
        self._windows_off += self._budget(self._paged(tokens))
        super()._charge(request, tokens, to_come)

    def _forward(self, batch: Batch) -> None:
        for request in batch.reqs:
            self._slide(request)
        super()._forward(batch)

    def _slide(self, request: Request) -> None:
        """Free the windows that no later token looks at, but those of the cache."""
        cached = sum(len(node.blocks) for node in request.nodes)
        behind = (request.kv_committed_len - self.window_tokens) // self.block_tokens - 1
        self.free_windows(request.blocks[: max(0, behind - cached)])

    # -- the prefix tree ------------------------------------------------------

    def _lock(self, nodes: list[Node]) -> None:
        super()._lock(nodes)
        for node in self.tree.locked_windows(nodes):
            locks = self.tree.window_locks
            locks[node.number] = locks.get(node.number, 0) + 1

    def _unlock(self, nodes: list[Node]) -> None:
        super()._unlock(nodes)
        for node in self.tree.locked_windows(nodes):
            self.tree.window_locks[node.number] -= 1

    def _release(self, request: Request, insert: bool) -> None:
        mine = set(request.blocks)
        super()._release(request, insert)
        for node in list(self.tree.nodes()):
            if mine.issuperset(node.blocks) and any(b not in self.window_of for b in node.blocks):
                self.tree.windowless.add(node.number)
                self.free_windows(node.blocks)
        for node in list(self.tree.nodes()):
            if node.number in self.tree.windowless and not node.children and not node.locks:
                self.tree._remove(node)
