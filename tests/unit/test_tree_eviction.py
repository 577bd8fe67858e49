# SPDX-License-Identifier: Apache-2.0
"""The choice of nodes against brute force over small trees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_core._core import BlockAllocator, Geometry
from kvcached_core.tree_eviction import nodes_to_evict

PAGE = 1024


def allocator_of(block_bytes: int, num_blocks: int) -> BlockAllocator:
    allocator = BlockAllocator(num_blocks, [Geometry(block_bytes, PAGE, num_blocks)])
    allocator.grow(num_blocks - 1)
    return allocator


class Forest:
    """Nodes in the order they should go, children before parents, and blocks that stay."""

    def __init__(self, data: st.DataObject) -> None:
        block_bytes = data.draw(st.sampled_from([256, 300, 1024, 1500, 2048]))
        self.allocator = allocator_of(block_bytes, 30)
        live = self.allocator.allocate(data.draw(st.integers(0, 29)))
        size = data.draw(st.integers(0, 8))
        owners = data.draw(st.lists(st.integers(-1, size - 1), min_size=len(live)))
        self.blocks: list[list[int]] = [[] for _ in range(size)]
        self.staying = {0}
        for block, owner in zip(live, owners, strict=False):
            if owner < 0:
                self.staying.add(block)
            else:
                self.blocks[owner].append(block)
        self.parents = [
            data.draw(st.integers(i + 1, size - 1))
            if i + 1 < size and data.draw(st.booleans())
            else -1
            for i in range(size)
        ]

    def pages(self, blocks: Iterable[int]) -> set[int]:
        return {page for block in blocks for page in range(*self.allocator.pages_of(block))}

    def emptied(self, nodes: Iterable[int]) -> set[int]:
        """Pages that nothing lives on once these nodes are gone."""
        gone = set(nodes)
        left = [b for i, blocks in enumerate(self.blocks) if i not in gone for b in blocks]
        before = self.pages([*left, *(b for i in gone for b in self.blocks[i]), *self.staying])
        return before - self.pages([*left, *self.staying])


@settings(max_examples=400, deadline=None)
@given(data=st.data(), num_pages=st.integers(0, 12))
def test_pages_empty_at_the_least_cost_in_order(data: st.DataObject, num_pages: int) -> None:
    forest = Forest(data)
    size = len(forest.blocks)
    chosen = nodes_to_evict(forest.allocator, forest.blocks, forest.parents, num_pages)
    emptied = forest.emptied(chosen)
    target = min(num_pages, len(forest.emptied(range(size))))

    assert chosen == sorted(set(chosen)) and all(0 <= i < size for i in chosen)
    # A node goes with all below it.
    for i, parent in enumerate(forest.parents):
        assert parent not in chosen or i in chosen
    # As much as asked for, or as can be.
    assert len(emptied) >= target
    # None goes that is not in the way: it lies on a page that empties, or hangs on one that does.
    for i in chosen:
        assert emptied & forest.pages(forest.blocks[i]) or forest.parents[i] in chosen
    # Never later than the shortest prefix of the order that is enough, ...
    enough = next(k for k in range(size + 1) if len(forest.emptied(range(k))) >= target)
    assert all(i < enough for i in chosen)
    # ... and so never less than as many nodes from the front would empty.
    assert len(emptied) >= len(forest.emptied(range(len(chosen))))

    before = forest.allocator.parked_pages
    forest.allocator.free([block for i in chosen for block in forest.blocks[i]])
    assert forest.allocator.parked_pages - before == len(emptied)


def evict(
    allocator: BlockAllocator, blocks: Sequence[Sequence[int]], parents: Sequence[int], pages: int
) -> list[int]:
    return nodes_to_evict(allocator, blocks, parents, pages)


def test_nodes_beside_running_requests_stay() -> None:
    allocator = allocator_of(PAGE // 2, 12)  # pages hold blocks 0 and 1, 2 and 3, ...
    live = allocator.allocate(11)
    assert live == list(range(1, 12))
    # Block 5 runs; the oldest nodes share their pages with it and with the null block.
    nodes = [[4], [1], [6, 7], [2, 3], [8, 9, 10, 11]]
    free = [-1] * 5
    assert evict(allocator, nodes, free, 0) == []
    assert evict(allocator, nodes, free, 1) == [2]
    assert evict(allocator, nodes, free, 2) == [2, 3]
    assert evict(allocator, nodes, free, 3) == [2, 3, 4]
    assert evict(allocator, nodes, free, 99) == [2, 3, 4]


def test_what_hangs_on_a_node_goes_with_it_though_it_empties_nothing() -> None:
    allocator = allocator_of(PAGE // 2, 12)
    allocator.allocate(11)
    # 0 and 1 lie beside block 5, which runs; both hang on 2, and 3 hangs on nothing.
    nodes = [[4], [1], [6, 7], [2, 3]]
    assert evict(allocator, nodes, [1, 2, -1, -1], 1) == [0, 1, 2]
    assert evict(allocator, nodes, [-1, 3, -1, -1], 1) == [2]


def test_two_nodes_share_a_page() -> None:
    allocator = allocator_of(PAGE // 2, 8)
    allocator.allocate(7)
    nodes = [[2], [4], [5], [3]]
    assert evict(allocator, nodes, [-1] * 4, 1) == [1, 2]
    assert evict(allocator, nodes, [-1] * 4, 2) == [0, 1, 2, 3]
