# SPDX-License-Identifier: Apache-2.0
"""SGLang's scheduler reduced to what decides about memory, over a real block allocator.

Named and ordered as SGLang does it: admission is PrefillAdder's, a decode step evicts, then
retracts.  What is freed is handed to the allocator later, as the elastic patch does it.  It is
deterministic: two of them that are told the same, and given the same memory, do the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcached_core._core import BlockAllocator
from kvcached_core.lockstep import PassOrder
from kvcached_core.pool import pages_filled
from kvcached_core.tree_eviction import nodes_to_evict


@dataclass
class Sampling:
    max_new_tokens: int
    ignore_eos: bool = False


@dataclass
class Arrival:
    """A request as the tokenizer sends it."""

    rid: int
    input_ids: Sequence[int]
    sampling_params: Sampling
    answer: int
    """Tokens after which it ends."""
    topic: int = 0
    """Requests of one topic begin alike."""


@dataclass
class Abort:
    rid: int


@dataclass(eq=False)
class Request:
    """A request in the engine."""

    rid: int
    origin_input_ids: Sequence[int]
    sampling_params: Sampling
    answer: int
    topic: int
    output_ids: list[int] = field(default_factory=list)
    kv_committed_len: int = 0
    nodes: list[Node] = field(default_factory=list)
    """What it uses of the prefix tree."""
    blocks: list[int] = field(default_factory=list)
    """What it holds itself, behind that."""
    finished: bool = False

    def __len__(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def to_come(self) -> int:
        return max(0, self.sampling_params.max_new_tokens - len(self.output_ids))


@dataclass(eq=False)
class Node:
    """Blocks with content, and what begins with them."""

    number: int
    parent: Node | None
    topic: int
    blocks: list[int]
    used: int = 0
    locks: int = 0
    children: list[Node] = field(default_factory=list)


class PrefixTree:
    """The prefix cache; evicts in the order of last use, leaves first."""

    def __init__(self, engine: LittleSglang) -> None:
        self._engine = engine
        self._numbers = 0
        self.root = Node(0, None, -1, [], locks=1)

    def add(self, parent: Node, topic: int, blocks: list[int], now: int) -> Node:
        self._numbers += 1
        node = Node(self._numbers, parent, topic, blocks, now)
        parent.children.append(node)
        return node

    def match(self, topic: int, most_blocks: int, now: int) -> list[Node]:
        """Whole nodes that a request of this topic begins with."""
        path: list[Node] = []
        below = [child for child in self.root.children if child.topic == topic]
        while below and len(below[0].blocks) <= most_blocks:
            most_blocks -= len(below[0].blocks)
            path.append(below[0])
            path[-1].used = now
            below = below[0].children
        return path

    def nodes(self) -> Iterator[Node]:
        found = list(self.root.children)
        for node in found:
            found += node.children
            yield node

    def in_order(self) -> list[Node]:
        """Every node that may be evicted, as it would be."""
        heap = [(n.used, n.number, n) for n in self.nodes() if not n.children and not n.locks]
        heapq.heapify(heap)
        gone: dict[int, int] = {}
        order = []
        while heap:
            node = heapq.heappop(heap)[2]
            order.append(node)
            parent = node.parent
            assert parent is not None
            gone[parent.number] = gone.get(parent.number, 0) + 1
            if gone[parent.number] == len(parent.children) and not parent.locks:
                heapq.heappush(heap, (parent.used, parent.number, parent))
        return order

    def evict(self, num_blocks: int) -> None:
        for node in self.in_order():
            if num_blocks <= 0:
                break
            num_blocks -= len(node.blocks)
            self._remove(node)

    def _remove(self, node: Node) -> None:
        assert not node.children and not node.locks and node.parent is not None
        node.parent.children.remove(node)
        self._engine.free(node.blocks)

    # -- what the core asks for ---------------------------------------------------

    @property
    def num_cached(self) -> int:
        return sum(len(node.blocks) for node in self.nodes() if not node.locks)

    def sweep(self) -> None:
        self._engine.land()

    def empty_pages(self, num_pages: int) -> None:
        nodes = self.in_order()
        index = {node: i for i, node in enumerate(nodes)}
        parents = [index.get(node.parent, -1) if node.parent else -1 for node in nodes]
        chosen = nodes_to_evict(
            self._engine.allocator, [node.blocks for node in nodes], parents, num_pages
        )
        for i in chosen:
            self._remove(nodes[i])
        self._engine.land()

    def evict_down_to(self, num_blocks: int) -> None:
        excess = self.num_cached - num_blocks
        self.empty_pages(pages_filled(self._engine.allocator, excess))
        self.evict(self.num_cached - num_blocks)
        self._engine.land()


@dataclass
class Batch:
    """Requests of one forward pass, and its own forward mode."""

    reqs: list[Request] = field(default_factory=list)
    extends: bool = False

    @property
    def forward_mode(self) -> Batch:
        return self

    def is_extend(self) -> bool:
        return self.extends


@dataclass
class Ratio:
    current: float


class LittleSglang:
    """The scheduler of one rank.

    Args:
        allocator: its rank's.
        block_tokens: tokens of a block, SGLang's page size.
        chunked_prefill_size: as SGLang's argument.
        max_prefill_tokens: likewise.
        ratio: of the tokens running requests may still make, what admission counts.
        keeps_prefixes: whether there is a prefix cache.
        gives_chunks_up: whether a prompt that has been computed in part, and cannot go on while
            nothing else runs, starts again from what is cached of it; else it holds its memory.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        block_tokens: int = 16,
        *,
        chunked_prefill_size: int | None = 64,
        max_prefill_tokens: int = 128,
        ratio: float = 0.5,
        keeps_prefixes: bool = True,
        gives_chunks_up: bool = False,
    ) -> None:
        self.allocator = allocator
        self.block_tokens = block_tokens
        self.chunked_prefill_size = chunked_prefill_size
        self.max_prefill_tokens = max_prefill_tokens
        self.new_token_ratio_tracker = Ratio(ratio)
        self.tree = PrefixTree(self)
        self._keeps_prefixes = keeps_prefixes
        self._gives_chunks_up = gives_chunks_up
        self.order = PassOrder()
        self.running_batch = Batch()
        self.last_batch: Batch | None = None
        self.waiting_queue: list[Request] = []
        self.chunked_req: Request | None = None
        self.finished: list[int] = []
        self.retracted = 0
        self._passes = 0
        self._freed: list[list[int]] = []

    # -- slots ----------------------------------------------------------------

    def free(self, blocks: list[int]) -> None:
        if blocks:
            self._freed.append(list(blocks))

    def land(self) -> None:
        freed, self._freed = self._freed, []
        for blocks in freed:  # one by one, as they would land if somebody had looked before
            self.allocator.free_array(np.unique(blocks).astype(np.int32))

    def available(self) -> int:
        self.land()
        return (self.allocator.num_clean - self.order.room().withheld_blocks) * self.block_tokens

    def _evictable(self) -> int:
        return self.tree.num_cached * self.block_tokens

    def _take(self, num_blocks: int) -> list[int]:
        self.land()
        # Raises where SGLang would give up: "prefill out of memory".
        return [int(block) for block in self.allocator.allocate_array(num_blocks)]

    def _evict_for(self, tokens: int) -> None:
        if self.available() < tokens:
            self.tree.evict(-(-tokens // self.block_tokens))

    # -- a pass ---------------------------------------------------------------

    def is_idle(self) -> bool:
        busy = self.running_batch.reqs or self.waiting_queue or self.chunked_req or self.last_batch
        return not busy

    def step(self, received: Sequence[Any]) -> None:
        """All of one turn of the event loop but the receiving."""
        self._passes += 1
        for item in received:
            if isinstance(item, Arrival):
                self.waiting_queue.append(
                    Request(item.rid, item.input_ids, item.sampling_params, item.answer, item.topic)
                )
            elif isinstance(item, Abort):
                self._abort(item.rid)
        self._merge()
        batch = self._prefill() or self._decode()
        if batch is None and self.chunked_req is not None and self._gives_chunks_up:
            self._give_up(self.chunked_req)
        if batch is not None:
            self._forward(batch)
        self.last_batch = batch

    def _abort(self, rid: int) -> None:
        self.waiting_queue = [r for r in self.waiting_queue if r.rid != rid]
        if self.chunked_req is not None and self.chunked_req.rid == rid:
            self._release(self.chunked_req, insert=False)
            self.chunked_req.finished = True
            self.chunked_req = None
        for request in self.running_batch.reqs:
            if request.rid == rid:
                request.answer = 0  # ends with its next token

    def _merge(self) -> None:
        last = self.last_batch
        if last is not None and last.extends:
            done = [r for r in last.reqs if r is not self.chunked_req]
            self.running_batch.reqs += [r for r in done if not r.finished]

    # As PrefillAdder admits.

    def _prefill(self) -> Batch | None:
        if not self.waiting_queue and self.chunked_req is None:
            return None
        ratio = self.new_token_ratio_tracker.current
        self._total_off = sum(r.to_come * ratio for r in self.running_batch.reqs)
        self._now_off = 0
        self._input_left = self.max_prefill_tokens
        self._chunk_left = self.chunked_prefill_size
        self._batch: list[tuple[Request, int]] = []
        if self.chunked_req is not None:
            self._add_chunked(self.chunked_req)
        for request in list(self.waiting_queue):
            if not self._add(request):
                break
        if not self._batch:
            return None
        added = [request for request, _ in self._batch]
        self.waiting_queue = [r for r in self.waiting_queue if r not in added]
        self._allocate_for(self._batch)
        return Batch(added, extends=True)

    def _total_left(self) -> float:
        reachable = self.order.room().reachable_blocks * self.block_tokens
        return self.available() + self._evictable() + reachable - self._total_off

    def _now_left(self) -> int:
        return self.available() + self._evictable() - self._now_off

    def _paged(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens) * self.block_tokens

    def _charge(self, request: Request, tokens: int, to_come: int) -> None:
        self._batch.append((request, tokens))
        tokens = self._paged(tokens)
        self._total_off += tokens + to_come + self.block_tokens
        self._now_off += tokens + self.block_tokens
        self._input_left -= tokens
        if self._chunk_left is not None:
            self._chunk_left -= tokens

    def _beside_left(self) -> int:
        """Tokens of a chunk there is room for in other pools, in whole blocks."""
        return 1 << 30

    def _fits_beside(self, tokens: int) -> bool:
        """Whether other pools have room for a request that lacks so many tokens."""
        return True

    def _add_chunked(self, request: Request) -> None:
        assert self._chunk_left is not None
        left = min(self._chunk_left, int(self._total_left()), self._now_left() - self.block_tokens)
        left = left // self.block_tokens * self.block_tokens
        if left <= 0:
            return  # it stays where it is until there is memory
        left = min(left, self._beside_left())
        if left <= 0:
            return
        missing = len(request) - request.kv_committed_len
        if missing <= left:
            self.chunked_req = None
        self._charge(request, min(missing, left), request.to_come if missing <= left else 0)

    def _give_up(self, request: Request) -> None:
        self.chunked_req = None
        self._release(request, insert=True)
        request.kv_committed_len = 0
        self.waiting_queue.insert(0, request)
        self.retracted += 1

    def _add(self, request: Request) -> bool:
        """Whether to go on with the next."""
        most = (len(request) - 1) // self.block_tokens
        nodes = self.tree.match(request.topic, most, self._passes)
        prefix = sum(len(node.blocks) for node in nodes) * self.block_tokens
        total = len(request) - prefix + request.to_come + self.block_tokens
        if total >= self._total_left() or not self._fits_beside(len(request) - prefix):
            return False
        tokens = self._paged(len(request) - prefix)
        if self._chunk_left is None and self._batch and tokens >= self._input_left:
            return False
        self._lock(nodes)
        chunk = tokens if self._chunk_left is None else min(tokens, self._chunk_left)
        fits = chunk + self.block_tokens <= self._now_left()
        fits = fits and self._fits_beside(len(request) - prefix)
        if total >= self._total_left() or not fits:
            self._unlock(nodes)
            return False
        if self._chunk_left is not None and tokens > self._chunk_left:
            chunk = self._chunk_left // self.block_tokens * self.block_tokens
            if chunk <= 0:
                self._unlock(nodes)
                return False
            assert self.chunked_req is None  # as SGLang asserts
            self.chunked_req = request
            self._start(request, nodes, prefix)
            self._charge(request, chunk, 0)
        else:
            self._start(request, nodes, prefix)
            self._charge(request, len(request) - prefix, request.to_come)
        lefts = [self._total_left(), self._now_left(), self._input_left, self._chunk_left]
        return all(left is None or left > 0 for left in lefts)

    def _start(self, request: Request, nodes: list[Node], prefix: int) -> None:
        request.nodes = nodes
        request.kv_committed_len = prefix

    def _allocate_for(self, batch: list[tuple[Request, int]]) -> None:
        self._evict_for(sum(tokens + self.block_tokens for _, tokens in batch))
        for request, tokens in batch:
            before = self._paged(request.kv_committed_len)
            request.kv_committed_len += tokens
            after = self._paged(request.kv_committed_len)
            request.blocks += self._take((after - before) // self.block_tokens)

    def _decode(self) -> Batch | None:
        requests = self.running_batch.reqs
        if requests and not self._decode_fits(requests):
            # Those go first that have made the least.
            requests.sort(key=lambda r: (len(r.output_ids), -len(r.origin_input_ids)), reverse=True)
            while True:
                request = requests.pop()
                self._release(request, insert=False)
                request.kv_committed_len = 0
                self.waiting_queue.append(request)
                self.retracted += 1
                if not requests or self._decode_fits(requests):
                    break
        if not requests:
            return None
        starting = [r for r in requests if r.kv_committed_len % self.block_tokens == 0]
        for request, block in zip(starting, self._take(len(starting)), strict=True):
            request.blocks.append(block)
        for request in requests:
            request.kv_committed_len += 1
        return Batch(requests)

    def _decode_fits(self, requests: list[Request]) -> bool:
        starting = sum(r.kv_committed_len % self.block_tokens == 0 for r in requests)
        self._evict_for(starting * self.block_tokens)
        return self.available() >= starting * self.block_tokens

    def _forward(self, batch: Batch) -> None:
        for request in batch.reqs:
            if request is self.chunked_req:
                continue
            request.output_ids.append(0)
            if len(request.output_ids) >= min(
                request.answer, request.sampling_params.max_new_tokens
            ):
                request.finished = True
                self.finished.append(request.rid)
                self._release(request, insert=True)
        self.running_batch.reqs = [r for r in self.running_batch.reqs if not r.finished]

    # -- the prefix tree ------------------------------------------------------

    def _lock(self, nodes: list[Node]) -> None:
        for node in nodes:
            node.locks += 1

    def _unlock(self, nodes: list[Node]) -> None:
        for node in nodes:
            node.locks -= 1

    def _release(self, request: Request, insert: bool) -> None:
        blocks, request.blocks = request.blocks, []
        nodes, request.nodes = request.nodes, []
        self._unlock(nodes)
        full = (request.kv_committed_len // self.block_tokens) - sum(len(n.blocks) for n in nodes)
        if insert and self._keeps_prefixes:
            parent = nodes[-1] if nodes else self.tree.root
            half = full // 2
            for part in (blocks[:half], blocks[half:full]):
                if part:
                    parent = self.tree.add(parent, request.topic, part, self._passes)
            blocks = blocks[full:]
        self.free(blocks)
