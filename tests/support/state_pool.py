# SPDX-License-Identifier: Apache-2.0
"""Does with an elastic pool of states what it does with the stock one, and compares.

It is run as a script beside the patched SGLang; its argument is a folder for a ledger.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace as NS
from typing import Any


class OneRank:
    """An engine of one rank."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def main(folder: str) -> None:
    import torch
    from sglang.srt.server_args import ServerArgs  # noqa: F401  (else its modules go in circles)

    # isort: split
    from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator
    from sglang.srt.mem_cache.elastic.allocator import ElasticMambaSlotAllocator
    from sglang.srt.mem_cache.elastic.arena import ElasticStateArena
    from sglang.srt.mem_cache.memory_pool import MambaPool

    from kvcached_core.sglang import SglangRank

    settings = {"page_size": 4096, "capacity": "8MiB", "name": "pool", "ledger_dir": folder}
    args = NS(device="cpu", kvcached_config=json.dumps(settings), mem_fraction_static=0.8)
    rank = SglangRank(args, 0, OneRank())
    shape = NS(conv=[(96, 3), (32, 2)], temporal=(4, 24, 40))  # some span pages, some share them
    params = NS(shape=shape, dtype=NS(conv=torch.bfloat16, temporal=torch.float32))
    make: dict[str, Any] = {
        "size": 20,
        "spec_state_size": 20,
        "cache_params": params,
        "mamba_layer_ids": [0, 2, 5],
        "device": "cpu",
    }
    arena = ElasticStateArena(rank, 3)
    ours, stock = MambaPool(arena=arena, **make), MambaPool(**make)
    slots, plain = ElasticMambaSlotAllocator(20, "cpu", arena), MambaSlotAllocator(20, "cpu")

    def tensors() -> Iterator[tuple[Any, Any]]:
        yield from zip(ours.mamba_cache.conv, stock.mamba_cache.conv, strict=True)
        yield ours.mamba_cache.temporal, stock.mamba_cache.temporal

    for a, b in tensors():
        assert a.shape == b.shape and a.dtype == b.dtype
        for x, y in zip(a, b, strict=True):
            assert x.is_contiguous() and x.stride() == y.stride()
    assert slots.alloc(1) is None  # there is no memory yet
    scheduler = rank.scheduler
    assert scheduler is not None
    scheduler.grow(9)
    rank._apply(scheduler.take_ops(1, 9))
    held = slots.alloc(5)
    plain.alloc(5)
    assert held.dtype == torch.int64
    assert 0 not in held.tolist() and len(set(held.tolist())) == 5

    def same() -> None:
        for a, b in tensors():
            assert all(torch.equal(x[held], y[held]) for x, y in zip(a, b, strict=True))

    for a, b in tensors():
        value = torch.randn((3, 5, *a.shape[2:])).to(a.dtype)
        a[:, held], b[:, held] = value, value
    same()
    for pool in (ours, stock):
        pool.copy_from(held[:2], held[3:])
    same()
    temporal = ours.mamba_cache.temporal
    assert torch.equal(temporal[:, held[0]], temporal[:, held[3]])
    for pool in (ours, stock):
        pool.clear_slots(held[1:3])
    same()
    kept = ours.get_cpu_copy(held)
    for pool in (ours, stock):
        pool.clear_slots(held)
        pool.load_cpu_copy(kept, held)
    same()
    assert torch.equal(temporal[:, held], kept[1])
    total = slots.current_size()
    slots.free(held[:3])
    assert slots.available_size() == total - 2 and slots.current_size() == total
    assert slots.most_requests() == total // 3
    for conv in ours.mamba_cache.conv:
        conv[:, 0] = 1  # what pads a batch is written to slot 0
    slots.clear()
    assert slots.available_size() == total
    rank.close()
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
