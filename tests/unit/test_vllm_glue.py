# SPDX-License-Identifier: Apache-2.0
"""What the vLLM patches call, on plain objects with the attributes vLLM's have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as NS
from typing import Any

import pytest

from kvcached_core import ConfigError, Ledger, RankDevice
from kvcached_core.vllm import VllmWorker, attach, check_supported, standalone

PAGE = 1 << 16


def vllm_config(directory: Path, **changes: Any) -> NS:
    settings = {"ledger_dir": str(directory), "page_size": PAGE, "capacity": 64 * PAGE}
    settings["start_wait_ms"] = 0
    settings.update(changes.pop("kvcached", {}))
    config = NS(
        cache_config=NS(kvcached_config=settings, cache_dtype="auto", block_size=16),
        parallel_config=NS(nnodes=1, distributed_executor_backend="mp"),
        device_config=NS(device_type="cpu"),
        kv_transfer_config=None,
        model_config=NS(enable_sleep_mode=False),
    )
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(config, owner) if owner else config, name, value)
    return config


def kv_cache_config(num_blocks: int = 100, stride: int = PAGE, layers: int = 1) -> NS:
    packed = stride > 0
    size = num_blocks * (stride or PAGE)
    return NS(
        num_blocks=num_blocks,
        kv_cache_tensors=[NS(size=size, block_stride=stride if packed else 0)] * layers,
        kv_cache_groups=[NS()],
        has_mamba_layers=False,
        elastic=None,
    )


def host_device(total: int = 64 * PAGE) -> RankDevice:
    return RankDevice("host", "host-0", total, granularity=4096)


def test_a_plain_engine_is_supported(tmp_path: Path) -> None:
    check_supported(vllm_config(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device_config__device_type": "tpu"}, "'tpu'.*use CUDA, ROCm or CPU"),
        ({"kv_transfer_config": NS(kv_connector="NixlConnector")}, "NixlConnector.*drop --kv-tra"),
        ({"parallel_config__nnodes": 2}, "use one node"),
        ({"parallel_config__distributed_executor_backend": "ray"}, "use the mp executor"),
        ({"cache_config__cache_dtype": "int8_per_token_head"}, "use auto or fp8"),
        ({"kvcached": {"layout": "diagonal"}}, "KVCACHED_LAYOUT"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_supported(vllm_config(tmp_path, **change))


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    config = vllm_config(
        tmp_path, parallel_config__nnodes=2, cache_config__cache_dtype="fp8_per_token_head"
    )
    with pytest.raises(ConfigError) as error:
        check_supported(config)
    assert str(error.value).count("\n  - ") == 2


def test_every_rank_is_bound_to_its_device(tmp_path: Path) -> None:
    ranks = [kv_cache_config(), kv_cache_config()]
    scheduler = attach(vllm_config(tmp_path), ranks, [host_device(), host_device()])
    assert scheduler is not None
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    assert ledger.total_leased() == 2 * PAGE  # the null block of both
    for rank in ranks:
        assert rank.elastic.shape.block_bytes == PAGE
        assert rank.elastic.slot == ledger.members()[0].slot
    scheduler.close()


def test_a_model_without_kv_cache_needs_no_ledger(tmp_path: Path) -> None:
    nothing = NS(num_blocks=1, kv_cache_tensors=[], has_mamba_layers=False, elastic=None)
    assert attach(vllm_config(tmp_path), [nothing], [host_device()]) is None


def test_a_per_layer_layout_has_a_segment_a_layer(tmp_path: Path) -> None:
    rank = kv_cache_config(stride=0, layers=4)
    config = vllm_config(tmp_path, kvcached={"layout": "layer"})
    scheduler = attach(config, [rank], [host_device()])
    assert scheduler is not None and rank.elastic.shape.segments == 4
    scheduler.close()


def test_layers_of_several_sizes_cannot_be_laid_out_per_layer(tmp_path: Path) -> None:
    rank = kv_cache_config(stride=0)
    rank.kv_cache_tensors = [NS(size=100 * n, block_stride=0) for n in (PAGE, 2 * PAGE)]
    with pytest.raises(ConfigError, match="Use KVCACHED_LAYOUT=block"):
        attach(vllm_config(tmp_path, kvcached={"layout": "layer"}), [rank], [host_device()])


def test_a_page_must_be_a_multiple_of_the_granularity(tmp_path: Path) -> None:
    config = vllm_config(tmp_path, kvcached={"page_size": 6000})
    with pytest.raises(ConfigError, match=r"not a multiple of the 4\.0 KiB granularity"):
        attach(config, [kv_cache_config()], [host_device()])


def test_a_full_device_is_refused_with_its_holders(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    neighbour = ledger.join("neighbour")
    assert neighbour.lease(64 * PAGE)
    with pytest.raises(ConfigError, match=r"cannot start.*neighbour 4\.0 MiB"):
        attach(vllm_config(tmp_path), [kv_cache_config()], [host_device()])


def test_a_policy_reaches_the_ledger(tmp_path: Path) -> None:
    policy = {"guarantee": "25%", "limit": 32 * PAGE, "weight": 300, "priority": 2}
    policy["prefix_cache"] = "12.5%"
    scheduler = attach(vllm_config(tmp_path, kvcached=policy), [kv_cache_config()], [host_device()])
    assert scheduler is not None
    (info,) = Ledger(str(tmp_path / "host-0.ledger")).members()
    assert (info.guarantee, info.limit, info.cache_limit) == (16 * PAGE, 32 * PAGE, 8 * PAGE)
    assert (info.weight, info.priority) == (300, 2)
    scheduler.close()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"guarantee": "50%"}, "cannot start.*neighbour"),
        ({"guarantee": 4 * PAGE, "limit": 2 * PAGE}, "cannot start.*limit"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(
    tmp_path: Path, policy: dict[str, Any], words: str
) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    neighbour = ledger.join("neighbour", guarantee=40 * PAGE)
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        attach(vllm_config(tmp_path, kvcached=policy), [kv_cache_config()], [host_device()])
    assert [m.name for m in ledger.members()] == ["neighbour"]
    neighbour.leave()


def test_an_unwritable_ledger_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = vllm_config(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="set KVCACHED_LEDGER_DIR"):
        attach(config, [kv_cache_config()], [host_device()])


def test_backends_that_ignore_the_stride_are_refused_for_packed_blocks(tmp_path: Path) -> None:
    worker = VllmWorker(vllm_config(tmp_path), None)
    worker.check_backends(["CPU_ATTN"])
    with pytest.raises(ConfigError, match=r"FLEX_ATTENTION.*--attention-backend"):
        worker.check_backends(iter(["CPU_ATTN", "FLEX_ATTENTION"]))
    per_layer = VllmWorker(vllm_config(tmp_path, kvcached={"layout": "layer"}), None)
    per_layer.check_backends(["FLEX_ATTENTION"])


def test_the_virtual_size_has_three_bounds(tmp_path: Path) -> None:
    worker = VllmWorker(vllm_config(tmp_path), None)
    assert worker.virtual_bytes(10 * PAGE) == 10 * PAGE
    assert worker.virtual_bytes(1000 * PAGE, world_size=2) == 32 * PAGE
    bounded = VllmWorker(vllm_config(tmp_path, kvcached={"max_kv": 5 * PAGE}), None)
    assert bounded.virtual_bytes(10 * PAGE) == 5 * PAGE


@pytest.mark.parametrize("loading", [0, 1 << 60], ids=["alone", "beside a neighbour that loads"])
def test_no_more_is_kept_for_graphs_than_they_can_take(tmp_path: Path, loading: int) -> None:
    worker = VllmWorker(vllm_config(tmp_path), None)
    total = 64 * PAGE
    worker.static_bytes, worker.graph_bytes = 5 * PAGE, 2 * PAGE + loading
    kept = total // 20 if loading else 2 * PAGE
    assert worker.describe().static_bytes == 5 * PAGE + kept
    assert worker.virtual_bytes(30 * PAGE) == 30 * PAGE - kept


def test_a_step_without_a_list_is_the_engines_warm_up(tmp_path: Path) -> None:
    config, rank = vllm_config(tmp_path), kv_cache_config()
    worker = VllmWorker(config, None)
    scheduler = attach(config, [rank], [worker.describe()])
    assert scheduler is not None
    worker.before_step(NS())  # no arena yet: nothing to do
    worker.open_arena(rank.elastic)
    warm_up = NS(
        kvcached_ops=None,
        scheduled_new_reqs=[NS(block_ids=([1, 2], [3]))],
        scheduled_cached_reqs=NS(new_block_ids=[None, ([7], [])]),
    )
    worker.before_step(warm_up)
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 64 * PAGE)
    assert ledger.members()[0].committed == 5 * PAGE
    scheduler.grow(2)
    worker.before_step(NS(kvcached_ops=scheduler.take_ops()))
    worker.close()
    scheduler.close()
    assert ledger.total_leased() == 0


def test_a_pool_without_an_engine_has_memory_for_every_block() -> None:
    scheduler = standalone(1000)
    assert scheduler.growable_blocks() == 999
    assert scheduler.grow(999) == 999
