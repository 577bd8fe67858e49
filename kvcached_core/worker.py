# SPDX-License-Identifier: Apache-2.0
"""The worker half: one rank's arena, and the step's list applied to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ._core import Arena, Backend, Geometry, Ledger, Mapper, PagePool
from .accounts import Account, Accounts
from .plan import BlockRanges, StepOps, WorkerBinding
from .usage import DeviceUsage

_WAIT_S = 20e-6
"""A step that took less to get its memory did not wait for any."""


class WorkerArena:
    """The KV memory of one rank.

    All pages but the null block's are unmapped at first; touching a block that
    is not committed faults.

    Args:
        backend: the device's memory.
        binding: what the scheduler half decided for this rank.
        is_computing: whether the device still has work of this engine's earlier steps, behind which
            a wait for memory is hidden; None if it never has.

    Raises:
        VmmError: the driver refused, or the member is gone from the ledger.
    """

    def __init__(
        self,
        backend: Backend,
        binding: WorkerBinding,
        is_computing: Callable[[], bool] | None = None,
    ) -> None:
        shape = binding.shape
        self.binding = binding
        self._backend = backend
        self._ledger = Ledger(binding.ledger_path, binding.capacity_bytes, binding.headroom_bytes)
        self._member = self._ledger.attach(binding.slot, binding.generation)
        self._geometry = Geometry(
            shape.block_bytes, shape.page_bytes, shape.num_blocks, shape.segments
        )
        # No ready handles: a page that leaves the arena leaves the process, so
        # that what the ledger calls free is free. Reuse happens while parked.
        self._pool = PagePool(backend, shape.page_bytes, 0, on_change=self._member)
        self._arena = Arena(backend, self._pool, self._geometry, binding.zero_recycled)
        self._mapper = Mapper(self._arena, binding.retry_ms, on_freed=self._member)
        self._is_computing = is_computing
        self._warm: BlockRanges = []

    def __deepcopy__(self, memo: dict[int, Any]) -> WorkerArena:
        return self  # Engines copy their cache configuration; the memory is one.

    @property
    def committed_bytes(self) -> int:
        return int(self._arena.committed_bytes)

    def set_static(self, num_bytes: int) -> None:
        """Tell the ledger what this process holds on the device besides its KV cache."""
        self._member.set_static(num_bytes)

    def set_guessed(self, num_bytes: int) -> None:
        """Of that, what the driver would not tell of this process alone."""
        self._member.set_guessed(num_bytes)

    def set_to_come(self, num_bytes: int, usage: DeviceUsage | None) -> None:
        """Of that, what this process was promised and has not taken yet.

        Args:
            num_bytes: how much.
            usage: what the driver counts. It is told first: what has come is in its figure then.
        """
        if usage is not None:
            usage.publish(self._ledger)
        self._member.set_to_come(num_bytes)

    def raw_segments(self) -> Any:
        """All segments as one DLPack object: int8, shape ``[segments, num_blocks * block_bytes]``,
        the rows apart by what lies between two segments.
        """
        shape = self.binding.shape
        return self._arena.dlpack(
            [shape.segments, shape.num_blocks * shape.block_bytes],
            [self._arena.segment_stride, 1],
            "int8",
            0,
        )

    def raw_tensor(self, segment: int = 0) -> Any:
        """One segment's memory as a DLPack object: int8, shape ``[num_blocks * block_bytes]``."""
        shape = self.binding.shape
        return self._arena.dlpack(
            [shape.num_blocks * shape.block_bytes],
            [1],
            "int8",
            segment * self._arena.segment_stride,
        )

    def apply(self, ops: StepOps) -> None:
        """Back what the step may touch, and give up what no later step does.

        Must be called before the step's first kernel is launched, on every
        rank, in the order the scheduler made the lists.

        Raises:
            VmmError: leased memory could not be had within ``retry_ms``; nothing of
                the failed list is committed.
        """
        begin = time.perf_counter()
        if self._warm:
            self._end_warm_up()
        if ops.commit:
            self._mapper.commit_now(ops.commit)
        else:
            self._mapper.wait_commits()
        self._member.time("step", self._exposed(time.perf_counter() - begin))
        if ops.commit_ahead:
            self._mapper.commit_ahead(ops.commit_ahead)
        if ops.decommit:
            self._mapper.decommit_later(ops.decommit)

    def _exposed(self, waited_s: float) -> float:
        """What of the step's wait for memory the device may have been idle."""
        # Still at work, it has been so all the time. Asking is worth it for a wait only.
        if waited_s < _WAIT_S or self._is_computing is None or not self._is_computing():
            return waited_s
        return 0.0

    def apply_now(self, ops: StepOps) -> None:
        """As :meth:`apply`, with nothing left to do in the background when it returns."""
        self.apply(ops)
        self._mapper.drain()

    def warm_up(self, block_ids: set[int]) -> None:
        """Back blocks for the engine's own warm-up, before any scheduler exists.

        Raises:
            MemoryError: the ledger has no room for them.
        """
        wanted = _ranges(block_ids - {0} - _ids(self._warm))
        if not wanted:
            return
        page_bytes = self.binding.shape.page_bytes * self.binding.shape.segments
        pages_of = self._geometry.pages_of
        most = sum(pages_of(end - 1)[1] - pages_of(start)[0] for start, end in wanted)
        account = Accounts([Account(self._ledger, self._member, (page_bytes,), page_bytes)])
        # In time for the neighbours to give memory back.
        if not account.wait_for([most], self.binding.retry_ms / 1000):
            raise MemoryError(
                f"the engine's warm-up needs {most * page_bytes} bytes of KV memory and the "
                f"ledger {self._ledger.path} has {self._ledger.available()}: free memory on the "
                "device or lower the warm-up batch (max_num_batched_tokens, max_num_seqs)"
            )
        before = self.committed_bytes
        self._mapper.commit_now(wanted)
        self._member.release(most * page_bytes - (self.committed_bytes - before))
        self._warm += wanted

    def _end_warm_up(self) -> None:
        self._mapper.decommit_later(self._warm)
        self._warm = []

    def close(self) -> None:
        """Unmap everything and leave the ledger."""
        self._mapper.stop()
        self._arena.close()
        self._member.leave()


def _ids(ranges: BlockRanges) -> set[int]:
    return {block for start, end in ranges for block in range(start, end)}


def _ranges(block_ids: set[int]) -> BlockRanges:
    ranges: BlockRanges = []
    for block in sorted(block_ids):
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges
