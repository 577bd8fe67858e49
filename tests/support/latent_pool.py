# SPDX-License-Identifier: Apache-2.0
"""Runs the release's kernels of latent attention over an elastic pool and the stock one.

The CPU engine has no attention that reads a latent cache, so the GPU's kernels are interpreted
(TRITON_INTERPRET=1). It is run as a script beside the patched SGLang; its argument is a folder for
a ledger.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace as NS
from typing import Any

from state_pool import OneRank  # beside this script

LAYERS, HEADS, LATENT, ROPE = 3, 16, 256, 32  # widths the kernels have a case for
PAGE, SIZE = 16, 256


def main(folder: str) -> None:
    import torch
    from sglang.srt.server_args import ServerArgs  # noqa: F401  (else its modules go in circles)

    # isort: split
    from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd
    from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd
    from sglang.srt.mem_cache.elastic.allocator import ElasticTokenToKVPoolAllocator
    from sglang.srt.mem_cache.elastic.arena import ElasticArena
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    from kvcached_core.sglang import SglangRank

    settings = {"page_size": 65536, "capacity": "8MiB", "name": "pool", "ledger_dir": folder}
    args = NS(device="cpu", kvcached_config=json.dumps(settings), mem_fraction_static=0.8)
    rank = SglangRank(args, 0, OneRank())
    make: dict[str, Any] = {
        "size": SIZE,
        "page_size": PAGE,
        "dtype": torch.float32,
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": ROPE,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    ours, stock = MLATokenToKVPool(arena=ElasticArena(rank), **make), MLATokenToKVPool(**make)
    slots = ElasticTokenToKVPoolAllocator(SIZE, PAGE, torch.float32, "cpu", ours)
    scheduler = rank.scheduler
    assert scheduler is not None
    for mine, theirs in zip(ours.kv_buffer, stock.kv_buffer, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    # A slot's rows of all layers lie side by side.
    assert ours.kv_buffer[0].stride(0) == LAYERS * (LATENT + ROPE)
    assert ours.kv_buffer[1].data_ptr() - ours.kv_buffer[0].data_ptr() == 4 * (LATENT + ROPE)

    assert slots.alloc(PAGE) is None  # there is no memory yet
    scheduler.grow(12)
    rank._apply(scheduler.take_ops(1, 12))
    # Two requests whose slots alternate page by page, the second with a page less.
    pages = slots.alloc(11 * PAGE).view(-1, PAGE)
    requests = [pages[0::2].flatten(), pages[1::2].flatten()]
    locations = torch.cat(requests)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    for layer in range(LAYERS):
        latent, rope = random(len(locations), 1, LATENT), random(len(locations), 1, ROPE)
        for pool in (ours, stock):
            pool.set_mla_kv_buffer(NS(layer_id=layer), locations, latent, rope)
        assert torch.equal(ours.kv_buffer[layer][locations], torch.cat((latent, rope), dim=-1))
        for mine, given in zip(
            ours.get_mla_kv_buffer(NS(layer_id=layer), locations), (latent, rope), strict=True
        ):
            assert torch.equal(mine, given)
    # What one layer wrote, another one's rows beside it did not lose.
    for mine, theirs in zip(ours.kv_buffer, stock.kv_buffer, strict=True):
        assert torch.equal(mine[locations], theirs[locations])

    starts = torch.tensor([0, *(len(r) for r in requests)]).cumsum(0).to(torch.int32)
    for layer in range(LAYERS):
        query = random(2, HEADS, LATENT + ROPE)
        more = random(2 * 5, HEADS, LATENT + ROPE)
        fresh = random(2 * 5, 1, LATENT + ROPE)
        found = []
        for pool in (ours, stock):
            key, value = pool.get_kv_buffer(layer)
            out = torch.zeros(2, HEADS, LATENT)
            splits = 4
            decode_attention_fwd(
                query,
                key,
                value,
                out,
                starts,
                locations,
                torch.zeros(2, HEADS, splits, LATENT),
                torch.zeros(2, HEADS, splits),
                torch.full((2,), splits, dtype=torch.int32),
                splits,
                0.1,
                1.0,
                1.0,
                has_mla=True,
            )
            extended = torch.zeros(2 * 5, HEADS, LATENT)
            extend_attention_fwd(
                more,
                fresh,
                fresh[..., :LATENT].contiguous(),
                extended,
                key,
                value,
                torch.tensor([0, 5, 10], dtype=torch.int32),
                starts,
                locations,
                None,
                True,
                None,
                5,
                1.0,
                1.0,
                sm_scale=0.1,
            )
            found.append((out, extended))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs) and mine.abs().sum() > 0

        # And it is attention over just these rows.
        for index, request in enumerate(requests):
            rows = stock.kv_buffer[layer][request, 0]
            weights = (query[index] @ rows.T * 0.1).softmax(-1)
            torch.testing.assert_close(
                found[0][0][index], weights @ rows[:, :LATENT], rtol=1e-4, atol=1e-4
            )
    target, source = requests[0][:5], requests[1][:5]
    for pool in (ours, stock):
        pool.move_kv_cache(target, source)
    for mine, theirs in zip(ours.kv_buffer, stock.kv_buffer, strict=True):
        assert torch.equal(mine[locations], theirs[locations])
    rank.close()
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
