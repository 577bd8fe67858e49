# SPDX-License-Identifier: Apache-2.0
"""The few values that travel between an engine's scheduler and its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockRanges = list[tuple[int, int]]
"""Half-open ranges ``[start, end)`` of block ids."""


@dataclass(frozen=True, slots=True)
class StepOps:
    """What every worker applies before it runs a step; block ids, not pages.

    Block ids mean the same on every rank, while page numbers do not: ranks of a
    pipeline hold different layers and so have blocks of different size.
    """

    commit: BlockRanges
    """Blocks this step may touch: backed before its first kernel is launched."""
    commit_ahead: BlockRanges
    """Blocks a later step may touch: backed in the background, before the next step."""
    decommit: BlockRanges
    """Blocks no later step touches: given up once the work in flight is done."""
    others: tuple[StepOps, ...] = ()
    """The same for every further pool of the engine, in their order."""


@dataclass(frozen=True, slots=True)
class RankDevice:
    """Where a worker's KV cache lives, as the worker sees it."""

    kind: Literal["cuda", "hip", "host"]
    key: str
    """Names the ledger: ``gpu-<uuid>`` or ``host-<name>``."""
    total_bytes: int
    """All memory of the device (host: the configured capacity)."""
    granularity: int
    """A page must be a multiple of this many bytes."""
    static_bytes: int = 0
    """Bytes the worker holds for anything but KV: weights, activations, graphs."""


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """The virtual range of one rank, in bytes."""

    num_blocks: int
    block_bytes: int
    """Stride from one block to the next within a segment."""
    page_bytes: int
    segments: int = 1
    """1 for the block-major layout, the number of tensors for the per-layer one."""


@dataclass(frozen=True, slots=True)
class WorkerBinding:
    """All a worker needs to build its arena and to keep the ledger true."""

    shape: ArenaShape
    ledger_path: str
    capacity_bytes: int
    headroom_bytes: int
    slot: int
    generation: int
    retry_ms: int
    zero_recycled: bool = False
