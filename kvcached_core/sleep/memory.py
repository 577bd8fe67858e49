# SPDX-License-Identifier: Apache-2.0
"""Where engines have their weights: moved into memory of ours, or in a pool of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._core import Arena, Backend, Geometry, PagePool
from .compare import Part

_SMALL_PAGE = 2 << 20
_LARGE_PAGE = 32 << 20
_LARGE = 1 << 30
"""Bytes from which on pages are large: a wake pays for each of them."""
_ALIGNED = 64
"""Tensors begin at multiples of this, for vector loads."""
_EMPTY_EVERY = 1 << 30
"""Bytes moved until the framework gives back what they had."""


class MovedMemory:
    """Tensors of a model, moved into a range of ours so that they can be unmapped.

    One storage after the other: beside the tensors only a page and a little more is needed.

    Args:
        backend: the device on which they are.
        tensors: parameters or buffers; those that share memory go on sharing it.

    Raises:
        MemoryError: there is no room.
    """

    def __init__(self, backend: Backend, tensors: Iterable[Any]) -> None:
        storages: dict[int, tuple[Any, list[Any]]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages.setdefault(storage.data_ptr(), (storage, []))[1].append(tensor)
        found = list(storages.values())
        storages.clear()
        offsets, size = [], 0
        for storage, _ in found:
            offsets.append(size)
            size += -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        page = max(_SMALL_PAGE if size < _LARGE else _LARGE_PAGE, backend.granularity)
        pages = -(-size // page)
        self.parts: Sequence[Part] = ()
        self._blocks = [(1, 1 + pages)]
        if not pages:
            return
        # Block 0 of an arena is always there; it is left out.
        pool = PagePool(backend, page, 0)
        self._arena = Arena(backend, pool, Geometry(page, page, 1 + pages))
        self.parts = (Part(self._arena.base + page, pages * page),)
        torch = sys.modules["torch"]
        memory = torch.from_dlpack(self._arena.dlpack([(1 + pages) * page], [1], "uint8", 0))
        committed, emptied_at = 1, 0
        found.reverse()
        for offset in offsets:
            storage, views = found.pop()
            begin = page + offset
            end = begin + storage.nbytes()
            needed = -(-end // page)
            if needed > committed:
                if not self._arena.commit([(committed, needed)]):
                    raise MemoryError("there is no memory to move the weights to")
                committed = needed
            bytes_of = torch.tensor([], dtype=torch.uint8, device=views[0].device)
            memory[begin:end].copy_(bytes_of.set_(storage))
            for view in views:
                view.data = torch.tensor([], dtype=view.dtype, device=view.device).set_(
                    memory.untyped_storage(),
                    begin // view.element_size() + view.storage_offset(),
                    view.size(),
                    view.stride(),
                )
            del storage, views, view, bytes_of
            if memory.is_cuda and offset - emptied_at > _EMPTY_EVERY:
                emptied_at = offset
                torch.cuda.empty_cache()
        if memory.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def back(self) -> None:
        """Have memory behind all of it.

        Raises:
            MemoryError: there is none; nothing has changed.
            VmmError: likewise, the system refused.
        """
        if self._blocks[0][1] > 1 and not self._arena.commit(self._blocks):
            raise MemoryError("the device has no memory for the weights")

    def drop(self) -> None:
        """Give all of it back."""
        if self._blocks[0][1] > 1:
            self._arena.decommit(self._blocks)


class PoolMemory:
    """Allocations of an engine's own pool, by the engine's own way to map and unmap them.

    Args:
        list_handles: what there is, in the order of allocation, which is that of the layers.
        part_of: where an allocation lies.
        map_one: has memory behind an allocation, or raises.
        unmap_one: gives it up.
    """

    def __init__(
        self,
        list_handles: Callable[[], Sequence[Any]],
        part_of: Callable[[Any], Part],
        map_one: Callable[[Any], object],
        unmap_one: Callable[[Any], object],
    ) -> None:
        self._list = list_handles
        self._part_of = part_of
        self._map = map_one
        self._unmap = unmap_one
        self._dropped: Sequence[Any] | None = None

    @property
    def _handles(self) -> Sequence[Any]:
        return self._list() if self._dropped is None else self._dropped

    @property
    def parts(self) -> Sequence[Part]:
        return [self._part_of(handle) for handle in self._handles]

    def back(self) -> None:
        """Have memory behind all of it, or raise the engine's error with nothing changed."""
        assert self._dropped is not None
        done: list[Any] = []
        try:
            for handle in self._dropped:
                self._map(handle)
                done.append(handle)
        except BaseException:
            for handle in reversed(done):
                self._unmap(handle)
            raise
        self._dropped = None

    def drop(self) -> None:
        """Give all of it to the device."""
        handles = list(self._handles)
        for handle in handles:
            self._unmap(handle)
        self._dropped = handles
