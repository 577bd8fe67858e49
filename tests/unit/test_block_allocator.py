# SPDX-License-Identifier: Apache-2.0
"""BlockAllocator against a model that recomputes everything from sets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core._core import BlockAllocator, Geometry, Growth, VmmError


def blocks_of(growth: Growth) -> set[int]:
    return {block for start, end in growth.ranges for block in range(start, end)}


def pages_of(geometry: Geometry, blocks: set[int]) -> set[int]:
    size, page = geometry.block_bytes, geometry.page_bytes
    return {p for b in blocks for p in range(b * size // page, ((b + 1) * size - 1) // page + 1)}


@dataclass
class Model:
    geometries: list[Geometry]
    committed: set[int] = field(default_factory=lambda: {0})
    live: set[int] = field(default_factory=lambda: {0})
    # Higher comes first. Fresh blocks and pages rank below all that were used, oldest first.
    rank: dict[int, int] = field(default_factory=dict)
    page_rank: dict[int, int] = field(default_factory=dict)
    clock: int = 0

    def home(self, block: int) -> int:
        return block * self.geometries[0].block_bytes // self.geometries[0].page_bytes

    def clean(self) -> set[int]:
        return self.committed - self.live

    def homed_clean(self, page: int) -> bool:
        return any(self.home(block) == page for block in self.clean())

    def order(self) -> list[int]:
        full = {self.home(b): 0 for b in self.committed}
        for block in self.live:
            full[self.home(block)] += 1
        return sorted(
            self.clean(),
            key=lambda b: (-full[self.home(b)], -self.page_rank[self.home(b)], -self.rank[b]),
        )

    def committed_pages(self) -> list[int]:
        return [len(pages_of(g, self.committed)) for g in self.geometries]

    def parked(self) -> set[int]:
        primary = self.geometries[0]
        return pages_of(primary, self.committed) - pages_of(primary, self.live)

    def growth(self, n: int) -> set[int]:
        primary = self.geometries[0]
        grown: set[int] = set()
        while True:
            have = pages_of(primary, self.committed | grown)
            rest = set(range(primary.num_blocks)) - self.committed - grown
            grown |= {b for b in rest if pages_of(primary, {b}) <= have}
            rest -= grown
            if len(grown) >= n or not rest:
                return grown
            grown.add(min(rest))

    def commit(self, blocks: set[int]) -> None:
        for block in sorted(blocks):
            self.clock += 1
            if not self.homed_clean(self.home(block)):
                self.page_rank[self.home(block)] = -self.clock
            self.committed.add(block)
            self.rank[block] = -self.clock

    def shrink(self, max_bytes: int) -> set[int]:
        primary = self.geometries[0]
        before = set(self.committed)
        pages = len(pages_of(primary, before))
        while (
            pages - len(pages_of(primary, self.committed))
        ) * primary.unit_bytes < max_bytes and self.parked():
            top = max(self.parked())
            self.committed -= {b for b in self.committed if top in pages_of(primary, {b})}
        return before - self.committed

    def allocate(self, n: int) -> list[int]:
        out = []
        for _ in range(n):
            block = self.order()[0]
            out.append(block)
            self.clock += 1
            self.live.add(block)
            self.page_rank[self.home(block)] = self.clock
        return out

    def free(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.clock += 1
            self.live.remove(block)
            self.rank[block] = self.clock
            self.page_rank[self.home(block)] = self.clock


SIZES = st.sampled_from(
    # equal; many per page; straddling; 2.25 on 2; several pages per block, straddling or not
    [(8, 8), (1, 8), (3, 8), (7, 64), (9, 8), (65, 64), (16, 4), (5, 2), (11, 4), (1, 1000)]
)


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(
        sizes=SIZES,
        num_blocks=st.integers(1, 40),
        segments=st.integers(1, 3),
        other_page=st.integers(1, 40),
        share=st.integers(1, 3),
    )
    def start(
        self, sizes: tuple[int, int], num_blocks: int, segments: int, other_page: int, share: int
    ) -> None:
        size, page = sizes
        geometries = [
            Geometry(size, page, num_blocks, segments),
            Geometry(max(1, size // share), other_page, num_blocks, segments),
        ]
        self.allocator = BlockAllocator(num_blocks, geometries)
        self.model = Model(geometries)

    @rule(n=st.integers(0, 12))
    def grow(self, n: int) -> None:
        before = self.model.committed_pages()
        expected = self.model.growth(n)
        cost = self.allocator.cost(n)
        growth = self.allocator.grow(n)
        self.model.commit(expected)
        after = self.model.committed_pages()
        assert blocks_of(growth) == expected
        assert growth.num_blocks == len(expected)
        assert bool(growth) == bool(expected)
        assert growth.page_delta == [b - a for a, b in zip(before, after, strict=True)] == cost

    @rule(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3))
    def grow_and_undo(self, sizes: list[int]) -> None:
        order = self.allocator.free_order()
        growths = [self.allocator.grow(n) for n in sizes]
        for growth in reversed(growths):
            undone = self.allocator.undo(growth)
            assert undone.ranges == growth.ranges
            assert undone.page_delta == [-delta for delta in growth.page_delta]
        assert self.allocator.free_order() == order

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, min(12, self.allocator.num_clean)))
        assert self.allocator.allocate(n) == self.model.allocate(n)

    @rule(excess=st.integers(1, 5))
    def allocate_too_many(self, excess: int) -> None:
        with pytest.raises(VmmError, match="grow first"):
            self.allocator.allocate(self.allocator.num_clean + excess)

    @precondition(lambda self: len(self.model.live) > 1)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        live = sorted(self.model.live - {0})
        blocks = data.draw(st.lists(st.sampled_from(live), unique=True, max_size=12))
        self.allocator.free(blocks)
        self.model.free(blocks)

    @rule(data=st.data())
    def free_wrongly(self, data: st.DataObject) -> None:
        wrong = data.draw(
            st.sampled_from([0, -1, self.allocator.num_blocks, *sorted(self.model.clean())])
        )
        live = sorted(self.model.live - {0})
        with pytest.raises(VmmError, match="free: block"):
            self.allocator.free([*live, wrong])
        if live:
            with pytest.raises(VmmError, match="twice"):
                self.allocator.free([*live, live[0]])

    @rule(pages=st.floats(0, 6))
    def shrink(self, pages: float) -> None:
        max_bytes = math.floor(pages * self.model.geometries[0].unit_bytes)
        before = self.model.committed_pages()
        expected = self.model.shrink(max_bytes)
        shrunk = self.allocator.shrink(max_bytes)
        after = self.model.committed_pages()
        assert blocks_of(shrunk) == expected
        assert shrunk.page_delta == [b - a for a, b in zip(before, after, strict=True)]

    @invariant()
    def states_partition_the_blocks(self) -> None:
        allocator, model = self.allocator, self.model
        assert allocator.num_live == len(model.live)
        assert allocator.num_clean == len(model.clean())
        assert allocator.num_live + allocator.num_clean + allocator.num_uncommitted == (
            allocator.num_blocks
        )

    @invariant()
    def pages_are_as_recomputed(self) -> None:
        allocator, model = self.allocator, self.model
        for index, pages in enumerate(model.committed_pages()):
            assert allocator.committed_pages(index) == pages
        assert allocator.parked_pages == len(model.parked())
        primary = model.geometries[0]
        for page in range(primary.pages_per_segment):
            live = sum(page in pages_of(primary, {block}) for block in model.live)
            assert allocator.live_on_page(page) == live

    @invariant()
    def order_is_as_promised(self) -> None:
        assert self.allocator.free_order() == self.model.order()


AllocatorMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None
)
TestAllocator = AllocatorMachine.TestCase


class StackMachine(RuleBasedStateMachine):
    """With one block per page: a stack of frees over an ascending list, as in a plain pool."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(60, [Geometry(8, 8, 60)])
        self.order: list[int] = []
        self.live: list[int] = []

    @rule(n=st.integers(0, 10))
    def grow(self, n: int) -> None:
        known = set(self.order) | set(self.live)
        fresh = [block for block in range(1, 60) if block not in known][:n]
        assert blocks_of(self.allocator.grow(n)) == set(fresh)
        self.order += fresh

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.order)))
        taken, self.order = self.order[:n], self.order[n:]
        assert self.allocator.allocate(n) == taken
        self.live += taken

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.live), unique=True))
        self.allocator.free(blocks)
        self.order = blocks + self.order
        self.live = [block for block in self.live if block not in blocks]

    @invariant()
    def same_order(self) -> None:
        assert self.allocator.free_order() == self.order


StackMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStack = StackMachine.TestCase


def test_geometry_describes_itself() -> None:
    geometry = Geometry(9, 8, 100, segments=3)
    assert geometry == Geometry(9, 8, 100, 3)
    assert hash(geometry) == hash(Geometry(9, 8, 100, 3))
    assert geometry != Geometry(9, 8, 100)
    assert eval(repr(geometry)) == geometry
    assert geometry.unit_bytes == 24
    assert geometry.pages_per_segment == 113
    assert geometry.pages_of(7) == (7, 9)
    with pytest.raises(IndexError):
        geometry.pages_of(100)


@pytest.mark.parametrize("args", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1, 0), (2**62, 8, 8)])
def test_geometry_refuses_what_cannot_be(args: tuple[int, ...]) -> None:
    with pytest.raises(VmmError, match="geometry"):
        Geometry(*args)


def test_geometries_must_belong_together() -> None:
    with pytest.raises(VmmError, match="at least one"):
        BlockAllocator(10, [])
    with pytest.raises(VmmError, match="same number"):
        BlockAllocator(10, [Geometry(8, 8, 9)])
    with pytest.raises(VmmError, match="largest blocks first"):
        BlockAllocator(10, [Geometry(4, 8, 10), Geometry(8, 8, 10)])


def test_undo_says_why_not() -> None:
    allocator = BlockAllocator(20, [Geometry(8, 8, 20)])
    first = allocator.grow(2)
    second = allocator.grow(2)
    with pytest.raises(VmmError, match="undo later growths first"):
        allocator.undo(first)
    allocator.undo(second)
    with pytest.raises(VmmError, match="not the latest"):
        allocator.undo(second)
    allocator.free(allocator.allocate(1))
    with pytest.raises(VmmError, match="allocated since"):
        allocator.undo(first)
    assert allocator.num_clean == 2


def test_indices_are_checked() -> None:
    allocator = BlockAllocator(20, [Geometry(8, 8, 20)])
    for call in (allocator.committed_pages, allocator.live_on_page, allocator.pages_of):
        for index in (-1, 20):
            with pytest.raises(IndexError):
                call(index)
    for method in (allocator.grow, allocator.cost, allocator.allocate, allocator.shrink):
        with pytest.raises(VmmError, match="negative"):
            method(-1)


@given(
    block_bytes=st.sampled_from([256, 300, 1024, 1500]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_pages_are_emptied_whole_and_in_order(block_bytes: int, data: st.DataObject) -> None:
    allocator = BlockAllocator(40, [Geometry(block_bytes, 1024, 40)])
    allocator.grow(39)
    live = allocator.allocate(data.draw(st.integers(1, 39)))
    candidates = data.draw(st.permutations(live))[: data.draw(st.integers(0, len(live)))]
    wanted = data.draw(st.integers(0, 45))

    touching: dict[int, set[int]] = {}
    for block in [0, *live]:
        for page in range(*allocator.pages_of(block)):
            touching.setdefault(page, set()).add(block)
    place = {block: i for i, block in enumerate(candidates)}
    # When the last block of a page comes up, the page can be emptied.
    ready = {p: max(place[b] for b in bs) for p, bs in touching.items() if bs <= place.keys()}
    stop = sorted(ready.values())[: max(wanted, 0)]
    emptied = {p for p, at in ready.items() if stop and at <= stop[-1]}

    got = allocator.emptied_by(list(candidates), wanted)
    assert got == [b for b in candidates if emptied & set(range(*allocator.pages_of(b)))]
    before = allocator.parked_pages
    allocator.free(got)
    assert allocator.parked_pages - before == len(emptied)
    assert len(emptied) >= min(wanted, len(ready))


def test_only_live_blocks_can_be_emptied() -> None:
    allocator = BlockAllocator(8, [Geometry(1024, 1024, 8)])
    allocator.grow(7)
    with pytest.raises(VmmError, match="block 3 is not live"):
        allocator.emptied_by([3], 1)
    with pytest.raises(VmmError, match="pages"):
        allocator.emptied_by([], -1)


def grown(num_blocks: int = 40) -> BlockAllocator:
    allocator = BlockAllocator(num_blocks, [Geometry(300, 1024, num_blocks)])
    allocator.grow(num_blocks - 1)
    return allocator


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_arrays_do_what_lists_do(data: st.DataObject) -> None:
    lists, arrays = grown(), grown()
    live: list[int] = []
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            n = data.draw(st.integers(0, lists.num_clean))
            taken, array = lists.allocate(n), arrays.allocate_array(n)
            assert isinstance(array, np.ndarray) and array.dtype == np.int32
            assert array.shape == (n,) and array.tolist() == taken
            live += taken
        else:
            freed = data.draw(st.permutations(live))[: data.draw(st.integers(0, len(live)))]
            lists.free(freed)
            arrays.free_array(np.array(freed, np.int32))
            live = [block for block in live if block not in freed]
        assert arrays.free_order() == lists.free_order()
        array = arrays.live_array()
        assert array.dtype == np.int32 and array.tolist() == sorted(live)


def test_empty_arrays_are_nothing() -> None:
    allocator = grown()
    order = allocator.free_order()
    assert allocator.allocate_array(0).shape == (0,)
    assert allocator.live_array().shape == (0,)
    allocator.free_array(np.empty(0, np.int32))
    assert allocator.free_order() == order


def test_arrays_are_taken_whole_or_not_at_all() -> None:
    allocator = grown()
    live = allocator.allocate_array(5)
    order = allocator.free_order()
    with pytest.raises(VmmError, match="grow first"):
        allocator.allocate_array(allocator.num_clean + 1)
    with pytest.raises(VmmError, match="negative"):
        allocator.allocate_array(-1)
    for wrong, words in [(0, "null block"), (-1, "not exist"), (40, "not exist"), (39, "not live")]:
        with pytest.raises(VmmError, match=words):
            allocator.free_array(np.array([*live, wrong], np.int32))
    with pytest.raises(VmmError, match="twice"):
        allocator.free_array(np.concatenate([live, live[:1]]))
    assert allocator.free_order() == order
    assert allocator.live_array().tolist() == sorted(live.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        np.array([1, 2], np.int64),
        np.array([1, 2], np.uint32),
        np.array([1.0, 2.0], np.float32),
        np.array([[1, 2]], np.int32),
        np.array([1, 9, 2, 9], np.int32)[::2],
        [1, 2],
    ],
    ids=["int64", "uint32", "float", "matrix", "strided", "list"],
)
def test_arrays_of_another_kind_are_refused(wrong: object) -> None:
    allocator = grown()
    assert set(allocator.allocate(2)) == {1, 2}
    with pytest.raises(TypeError):
        allocator.free_array(wrong)
    assert allocator.num_live == 3


def test_an_array_outlives_its_allocator_and_is_a_copy() -> None:
    allocator = grown()
    taken = allocator.allocate_array(3)
    live = allocator.live_array()
    live[:] = 0
    assert allocator.live_array().tolist() == sorted(taken.tolist())
    del allocator
    assert taken.tolist() == [1, 2, 3]


def test_read_only_arrays_can_be_freed() -> None:
    allocator = grown()
    taken = allocator.allocate_array(3)
    taken.flags.writeable = False
    allocator.free_array(taken)
    assert allocator.num_live == 1
