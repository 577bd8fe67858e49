# SPDX-License-Identifier: Apache-2.0
"""What the vLLM patches call.

Nothing here imports vLLM: the patches hand their objects in, so this module is
the same for every pinned release and is tested without the engine.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._core import Backend
from .config import Config, ConfigError
from .devices import describe, open_backend, page_size
from .free_queue import ElasticFreeQueue
from .holding import Holding
from .join import join
from .mps import require_launched_with
from .plan import ArenaShape, RankDevice, StepOps, WorkerBinding
from .scheduler import ElasticScheduler
from .sleep.vllm import fall_asleep, wake_up, worker_sleep
from .sleep.wake_lease import CANNOT_WAKE
from .sleep.worker_sleep import WorkerSleep
from .static_memory import StaticMemory, follow_static
from .worker import WorkerArena

# Below the engine's own logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.kvcached")

__all__ = [
    "CANNOT_WAKE",
    "ElasticFreeQueue",
    "ElasticScheduler",
    "VllmWorker",
    "attach",
    "check_supported",
    "fall_asleep",
    "standalone",
    "wake_up",
]

_GRAPHS_AT_MOST = 20
"""The part of a device that an engine's graphs take at most: a twentieth."""

# Attention backends whose kernels find a block by the tensor's own stride. Others
# assume that blocks are packed and would read their neighbours' bytes.
_STRIDED_BACKENDS = frozenset(
    {
        "CPU_ATTN",
        "CUTLASS_MLA",
        "FLASHINFER",
        "FLASHINFER_MLA",
        "FLASHMLA",
        "FLASH_ATTN",
        "FLASH_ATTN_DIFFKV",
        "FLASH_ATTN_MLA",
        "TRITON_ATTN",
        "TRITON_MLA",
    }
)


def load_config(vllm_config: Any) -> Config:
    """The settings of this engine: environment, then ``--kvcached-config``."""
    return Config.load(vllm_config.cache_config.kvcached_config)


def check_supported(vllm_config: Any) -> None:
    """Refuse what an elastic KV cache cannot do yet, at start, with the remedy.

    Raises:
        ConfigError: one line per obstacle.
    """
    require_launched_with(load_config(vllm_config))
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    reasons = []
    device = str(vllm_config.device_config.device_type)
    if device not in ("cuda", "cpu"):
        reasons.append(f"device type {device!r} has no page backend; use CUDA, ROCm or CPU")
    if vllm_config.kv_transfer_config is not None:
        name = vllm_config.kv_transfer_config.kv_connector
        reasons.append(
            f"KV connector {name!r} addresses or registers the whole KV cache, which is mapped "
            "only in part; drop --kv-transfer-config (or --kv-offloading-size)"
        )
    if parallel.nnodes > 1:
        reasons.append("engines over several nodes have no common ledger; use one node")
    if parallel.distributed_executor_backend == "ray":
        reasons.append("Ray workers are not members of the ledger; use the mp executor")
    if str(cache.cache_dtype).endswith("per_token_head"):
        reasons.append(
            f"--kv-cache-dtype {cache.cache_dtype} initialises every block at start; "
            "use auto or fp8"
        )
    if reasons:
        raise ConfigError(
            "kvcached was asked for (ENABLE_KVCACHED or --enable-kvcached) and cannot run:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
            + "\nOr switch it off: unset ENABLE_KVCACHED."
        )


class VllmWorker:
    """One vLLM worker's side: its device before the KV cache exists, its arena after.

    Args:
        vllm_config: the engine's configuration.
        ordinal: device ordinal as this process sees it; ignored on the CPU.
        is_rocm: whether a ``cuda`` device type is a ROCm device.
    """

    def __init__(self, vllm_config: Any, ordinal: int | None, is_rocm: bool = False) -> None:
        self.config = load_config(vllm_config)
        device = str(vllm_config.device_config.device_type)
        self.kind = "host" if device == "cpu" else "hip" if is_rocm else "cuda"
        self.layout = self.config.layout
        self._backend: Backend = open_backend(self.kind, ordinal or 0, self.config)
        self._arena: WorkerArena | None = None
        self._static: StaticMemory | None = None
        self._sleep: WorkerSleep | None = None
        self._restoring = False
        self._spare = self._spare_asleep = 0
        self.static_bytes = 0
        """Weights and the profiled peak of activations."""
        self.graph_bytes = 0
        """What the engine reckons for the graphs it is yet to capture."""

    @property
    def _graphs(self) -> int:
        # The engine multiplies by dozens what the whole device lost while it captured one, so a
        # neighbour that loads meanwhile makes it many times the device.
        return min(max(0, self.graph_bytes), self._backend.memory_info()[1] // _GRAPHS_AT_MOST)

    def virtual_bytes(self, limit: int, world_size: int = 1) -> int:
        """The KV bytes this rank may ever have: virtual, so it costs nothing to be generous.

        Args:
            limit: what the engine would have reserved on an empty device, but for its graphs.
            world_size: ranks that share the device's memory (host backend).
        """
        limit -= self._graphs
        if self.kind == "host":
            limit = min(limit, self.config.capacity // world_size - self.static_bytes)
        if self.config.max_kv is not None:
            limit = min(limit, self.config.max_kv)
        return limit

    def describe(self) -> RankDevice:
        return describe(self._backend, self.kind, self.config, self.static_bytes + self._graphs)

    def open_arena(self, binding: WorkerBinding) -> WorkerArena:
        self._arena = arena = WorkerArena(self._backend, binding, self._computing())
        if self.kind != "host":
            self._static = follow_static(arena, self.describe(), self._graphs)
        return arena

    def _computing(self) -> Callable[[], bool] | None:
        if self.kind == "host":
            return None
        cuda = sys.modules["torch"].cuda
        return lambda: not cuda.current_stream().query()

    def own_weights(self, vllm_config: Any, model: Any, cumem: Any) -> None:
        """Be able to put a loaded model to sleep; see :func:`worker_sleep`."""
        # The host's backend counts what the KV cache may have; weights are beside that.
        host = self.kind == "host"
        backend = open_backend(self.kind, 0, self.config) if host else self._backend
        self._sleep = worker_sleep(backend, self.config, vllm_config, model, cumem)
        if host:
            self.static_bytes = self._sleep.num_bytes

    def apply_now(self, ops: StepOps) -> None:
        if self._arena is not None:
            self._arena.apply_now(ops)

    def sleep(self, level: int) -> None:
        """Give the weights' memory up, and raise with all as it was if that fails."""
        if self._sleep is None:
            raise RuntimeError("sleep mode is off: start the engine with --enable-sleep-mode")
        self._sleep.sleep(level)
        if self._static is not None and self._arena is not None:
            self._spare = self._spare_asleep = self._static.spare(self._arena.committed_bytes)
        self._note_away()

    def wake(self, tags: Sequence[str] | None) -> None:
        """Have it back, with its content under way; what computes with it waits for that."""
        if self._sleep is None:
            return
        self._sleep.wake(tags)
        if not self._sleep.away_of(["weights"]):
            self._spare = 0
        self._note_away()
        self._order_copies()
        self._restoring = True

    def sleep_again(self, tags: Sequence[str] | None) -> None:
        """Take back the latest wake."""
        if self._sleep is not None:
            self._sleep.sleep_again(tags)
            self._spare = self._spare_asleep
            self._note_away()

    def needs_reload(self, tags: Sequence[str] | None) -> bool:
        """Whether a wake of these tags left weights without content, and nobody else loads any."""
        return tags is None and self._sleep is not None and self._sleep.level == 2

    def away(self) -> int:
        """Bytes that this rank does without now: weights, and what computing takes besides."""
        return 0 if self._sleep is None else self._sleep.away() + self._spare

    def away_of(self, tags: Sequence[str] | None) -> int:
        """Bytes that a wake of these tags needs."""
        if self._sleep is None:
            return 0
        return self._sleep.away_of(tags) + (self._spare if not tags or "weights" in tags else 0)

    def _note_away(self) -> None:
        if self._static is not None:
            self._static.set_away(self.away())

    def _order_copies(self) -> None:
        if self.kind != "host":
            stream = sys.modules["torch"].cuda.current_stream()
            self._backend.copies_before(int(stream.cuda_stream))

    def check_backends(self, names: Iterable[str]) -> None:
        """Refuse attention backends that ignore the block stride.

        Raises:
            ConfigError: names the backend and the way out.
        """
        wrong = sorted(set(names) - _STRIDED_BACKENDS)
        if wrong and self.layout == "block":
            raise ConfigError(
                f"attention backend {', '.join(wrong)} does not read KV blocks by their stride, "
                "which kvcached's block-major layout needs; choose another with "
                "--attention-backend (e.g. FLASH_ATTN, FLASHINFER, TRITON_ATTN), or set "
                "KVCACHED_LAYOUT=layer"
            )

    def before_step(self, scheduler_output: Any) -> None:
        """Apply the step's list; a step without one is the engine's own warm-up."""
        if self._arena is None:
            return
        if self._restoring:
            # Once more: this may be another thread, and another stream, than that of the wake.
            self._restoring = False
            self._order_copies()
        ops = scheduler_output.kvcached_ops
        if ops is not None:
            self._arena.apply(ops)
            if self._static is not None:
                self._static.refresh(self._arena.committed_bytes)
        else:
            self._arena.warm_up(_named_blocks(scheduler_output))

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if self._sleep is not None:
            self._sleep.close()


def _named_blocks(scheduler_output: Any) -> set[int]:
    """All block ids a scheduler output mentions."""
    tables = [request.block_ids for request in scheduler_output.scheduled_new_reqs]
    tables += [t for t in scheduler_output.scheduled_cached_reqs.new_block_ids if t is not None]
    return {block for table in tables for group in table for block in group}


def attach(
    vllm_config: Any, kv_cache_configs: Sequence[Any], devices: Sequence[RankDevice]
) -> ElasticScheduler | None:
    """Join the ledgers of all ranks and bind every rank's KV cache to them.

    Sets ``kv_cache_configs[rank].elastic`` to the rank's :class:`WorkerBinding`.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_configs: one per rank, as the engine planned them.
        devices: one per rank, as :meth:`VllmWorker.describe` gave them.

    Returns:
        The scheduler half, or None for a model without a KV cache.

    Raises:
        ConfigError: the memory is not there or the plan does not fit the layout.
    """
    config = load_config(vllm_config)
    shapes = [
        _shape(kv_cache_config, device, config)
        for kv_cache_config, device in zip(kv_cache_configs, devices, strict=True)
    ]
    if not any(shapes):
        return None
    joined = join(
        config,
        shapes,
        devices,
        holding=Holding(
            vllm_config.cache_config.block_size / max(1, len(kv_cache_configs[0].kv_cache_groups))
        ),
        zero_recycled=[bool(c.has_mamba_layers) for c in kv_cache_configs],
        logger=logger,
    )
    for kv_cache_config, binding in zip(kv_cache_configs, joined.bindings, strict=True):
        if binding is not None:
            kv_cache_config.elastic = binding
    return joined.scheduler


def _shape(kv_cache_config: Any, device: RankDevice, config: Config) -> ArenaShape | None:
    tensors = kv_cache_config.kv_cache_tensors
    if not tensors:
        return None
    num_blocks = int(kv_cache_config.num_blocks)
    size = page_size(device, config)
    if config.layout == "block":
        return ArenaShape(num_blocks, int(tensors[0].block_stride), size)
    strides = {int(tensor.size) // num_blocks for tensor in tensors}
    if len(strides) > 1:
        raise ConfigError(
            "KVCACHED_LAYOUT=layer needs layers with KV blocks of one size; this model has "
            f"{sorted(strides)} bytes. Use KVCACHED_LAYOUT=block"
        )
    return ArenaShape(num_blocks, strides.pop(), size, segments=len(tensors))


def standalone(num_blocks: int) -> ElasticScheduler:
    """A scheduler half that shares with nobody and has memory for every block.

    For block pools that no engine owns (simulators, the engine's own unit
    tests): same code, no ledger.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    return ElasticScheduler(num_blocks, [ArenaShape(num_blocks, page, page)], [])
