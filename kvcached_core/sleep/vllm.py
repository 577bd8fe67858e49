# SPDX-License-Identifier: Apache-2.0
"""vLLM's sleep mode under the ledger: what its patches call, in the order that matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._core import Backend
from ..config import Config
from .compare import Part
from .host_file import sweep
from .memory import MovedMemory, PoolMemory
from .weights_copy import copy_of_engine, fingerprint
from .worker_sleep import Group, WorkerSleep

if TYPE_CHECKING:
    from ..scheduler import ElasticScheduler


def fall_asleep(scheduler: ElasticScheduler, executor: Any, level: int) -> None:
    """Send an idle engine to sleep: its KV cache goes first, then its weights.

    Args:
        scheduler: the engine's scheduler half.
        executor: the engine's, whose workers are to sleep.
        level: 1 keeps the weights on the host, 2 does not.

    Raises:
        Exception: a worker's; those that slept are awake again.
    """
    assert scheduler.sleep is not None
    executor.collective_rpc("kvcached_call", args=("apply_now", scheduler.give_all()))
    try:
        executor.sleep(level)
    except BaseException:
        # Their memory is still this engine's, as far as anybody knows: no lease is needed.
        executor.collective_rpc("kvcached_call", args=("wake", None))
        raise
    scheduler.sleep.note_away(executor.collective_rpc("kvcached_call", args=("away",)))


def wake_up(scheduler: ElasticScheduler, executor: Any, tags: list[str] | None) -> None:
    """Have an engine's weights back, once the ledgers have room for them.

    Args:
        scheduler: the engine's scheduler half.
        executor: the engine's.
        tags: what is to wake; None for all.

    Raises:
        WakeRefused: there is no room; the message says who holds it.
        Exception: a worker's; all are asleep as before.
    """
    assert scheduler.sleep is not None
    known = tags is None or set(tags) <= set(executor.sleeping_tags)
    if not executor.is_sleeping or not known:
        executor.wake_up(tags)  # says so, and does nothing
        return
    coming = executor.collective_rpc("kvcached_call", args=("away_of", tags))
    with scheduler.sleep.waking(coming):
        try:
            executor.wake_up(tags)
        except BaseException:
            executor.collective_rpc("kvcached_call", args=("sleep_again", tags))
            raise


def worker_sleep(
    backend: Backend, config: Config, vllm_config: Any, model: Any, cumem: Any
) -> WorkerSleep:
    """What one rank can put to sleep, once its weights are loaded.

    Args:
        backend: the rank's device.
        config: kvcached's settings.
        vllm_config: the engine's.
        model: the rank's, loaded.
        cumem: the engine's module ``vllm.device_allocator.cumem``, in whose pool the weights are;
            None on the host, where they are moved into memory that can be unmapped.
    """
    parallel = vllm_config.parallel_config
    identity = (
        vllm_config.model_config.model,
        vllm_config.model_config.revision,
        str(vllm_config.model_config.dtype),
        vllm_config.model_config.quantization,
        (parallel.world_size, parallel.rank),
        [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()],
    )

    kind = "host" if cumem is None else "cuda"
    directory = config.weights_path(kind)
    sweep(directory)

    def group(memory: Any, key: str | None) -> Group:
        return Group(backend, memory, copy_of_engine(backend, directory, key, kind))

    if cumem is None:
        return WorkerSleep(
            group(MovedMemory(backend, model.parameters()), fingerprint(*identity)),
            # A reload computes no buffers, so they are kept by every level, as on a GPU.
            {"weights": group(MovedMemory(backend, model.buffers()), None)},
        )

    def pool(tag: str) -> PoolMemory:
        def handles() -> Sequence[Any]:
            data = cumem.CuMemAllocator.get_instance().pointer_to_data.values()
            return [item.handle for item in data if item.tag == tag]

        return PoolMemory(
            handles,
            lambda handle: Part(int(handle[2]), int(handle[1])),
            cumem.create_and_map,
            cumem.unmap_and_release,
        )

    return WorkerSleep(
        group(pool("weights"), fingerprint(*identity)),
        # The arena is not in the pool; what else was allocated with the cache has content.
        {"kv_cache": group(pool("kv_cache"), None)},
    )
