# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a prefix tree to evict so that whole pages empty."""

from __future__ import annotations

from collections.abc import Sequence

from ._core import BlockAllocator


def nodes_to_evict(
    allocator: BlockAllocator,
    blocks: Sequence[Sequence[int]],
    parents: Sequence[int],
    num_pages: int,
) -> list[int]:
    """Choose nodes whose going empties ``num_pages`` more pages, or as many as can be.

    Args:
        allocator: knows which blocks share a page.
        blocks: for every evictable node, in the order they should go, its blocks.
        parents: for every node the index of its parent, which comes after it, or -1.
        num_pages: of the allocator's primary geometry.

    Returns:
        Indices of nodes, in the given order. A node goes whole, and with all below it; nodes
        that share their pages with blocks that stay are left alone.
    """
    candidates = [block for node in blocks for block in node]
    chosen = set(allocator.emptied_by(candidates, num_pages))
    going = [not chosen.isdisjoint(node) for node in blocks]
    for index in range(len(blocks) - 1, -1, -1):
        if parents[index] >= 0 and going[parents[index]]:
            going[index] = True
    return [index for index, goes in enumerate(going) if goes]
