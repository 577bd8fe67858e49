# SPDX-License-Identifier: Apache-2.0
"""What the SGLang patches call.

Nothing here imports SGLang or torch: the patches hand their objects in.  Every
rank of SGLang has a scheduler and a worker in one process; the first rank
plans each pass, and all of them carry it out (see lockstep.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ._core import Backend, BlockAllocator, VmmError
from .config import ConfigError
from .devices import defaults, describe, open_backend, page_size
from .join import Joined, join
from .lockstep import Copy, Leader, Load, Need, PassOrder, Replica, Room
from .plan import ArenaShape, RankDevice, StepOps, WorkerBinding
from .pool import CachedBlocks, geometry_of, pages_filled
from .scheduler import ElasticScheduler
from .sglang_checks import check_backends, check_model, check_supported, load_config
from .sglang_load import PoolKind, States, Tokens, load_of, pool_tokens
from .sleep.sglang import Reload, SglangSleep, weights_of
from .static_memory import StaticMemory, follow_static
from .tree_eviction import nodes_to_evict
from .waker import Waker
from .worker import WorkerArena

if TYPE_CHECKING:
    from .engine_metrics import EngineMetrics

logger = logging.getLogger("sglang.kvcached")

__all__ = [
    "PassOrder",
    "SglangRank",
    "check_backends",
    "check_model",
    "check_supported",
    "load_config",
    "load_of",
    "nodes_to_evict",
    "pool_tokens",
]

DEFAULT_PAGE_SIZE = 16
"""Tokens. At SGLang's own default, 1, a decode step takes neighbouring slots for all its requests,
and a page of memory is empty only when the last of them is gone."""

_LOOK_S = 0.02
_PAUSE_MS = 2
_METRICS_S = 0.5
_STUCK_PASSES = 100
"""Passes in which nothing ran, of 2 ms at most each: others had the time to answer an ask."""


class Ranks(Protocol):
    """The ranks of one engine that schedule alike, and how they share a value."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""

    def broadcast(self, value: Any) -> Any:
        """The first rank's value."""


@dataclass(slots=True)
class RankPool:
    """One pool of a rank: its arenas, which share their block ids, and what its blocks are."""

    arenas: list[WorkerArena]
    kind: PoolKind


class SglangRank:
    """One rank: its device before the KV cache exists, then its arenas and its share of each pass.

    Args:
        server_args: the engine's arguments.
        ordinal: device ordinal as this process sees it; ignored on the CPU.
        ranks: the ranks that schedule alike; all make theirs at the same time.
        own_bytes: held on the device by the framework, weights included that are to be moved.
        num_pools: pools there will be.
        is_rocm: whether a ``cuda`` device is a ROCm device.
        runner: if the engine is to sleep, whose model's weights are moved to where they can.
    """

    def __init__(
        self,
        server_args: Any,
        ordinal: int,
        ranks: Ranks,
        *,
        own_bytes: int = 0,
        num_pools: int = 1,
        is_rocm: bool = False,
        runner: Any = None,
    ) -> None:
        self.config = load_config(server_args)
        self.kind = "host" if server_args.device == "cpu" else "hip" if is_rocm else "cuda"
        self.sleep: SglangSleep | None = None
        """What the engine's memory saver does here; None without one."""
        if runner is not None:
            place = (ranks.rank, ranks.size)
            weights = weights_of(server_args, self.config, self.kind, ordinal, runner.model, place)
            self.sleep = SglangSleep(self, ranks, weights, Reload(runner))
        self.order = PassOrder()
        self._backend: Backend = open_backend(self.kind, ordinal, self.config)
        self._ranks = ranks
        self._pools: list[RankPool] = []
        self._block_tokens = 1
        self._chunk: int | None = _chunk(server_args)
        self._static: StaticMemory | None = None
        self._joined: Joined | None = None
        self._leader: Leader | None = None
        self._replica: Replica | None = None
        self._waker: Waker | None = None
        self._engine: Any = None
        self._metrics: EngineMetrics | None = None
        self._exported_at = 0.0
        self._busy = False
        self._passes = self._stuck = 0
        self._stuck_at = -1
        self._looked_at = 0.0
        self._heard = -1
        self.virtual_bytes, self._static_bytes = self._size(
            server_args.mem_fraction_static, own_bytes, num_pools
        )
        """The KV bytes every rank may ever have: virtual, so they cost nothing."""
        self.land: Callable[[], object] = lambda: None
        """Hands freed blocks over to the allocator; called before every pass, on every rank."""

    # -- start ----------------------------------------------------------------

    def _size(self, fraction: float, own_bytes: int, num_pools: int) -> tuple[int, int]:
        if self.kind == "host":
            static = 0 if self.sleep is None else self.sleep.num_bytes
            most = self.config.capacity // self._ranks.size - static
        else:
            # As on an empty device: neighbours give memory back. What the engine leaves for
            # activations and graphs is counted as its own.
            total = self._backend.memory_info()[1]
            most = int(total * fraction) - own_bytes
            static = own_bytes + int(total * (1 - fraction))
        # What no ledger will ever lease must not be promised to a request, which would wait for
        # ever: the headroom, and of every pool the padding block with what the last page lacks.
        kind = defaults(self.kind)
        page = self.config.page_size or max(kind.page_size, self._backend.granularity)
        most -= kind.headroom if self.config.headroom is None else self.config.headroom
        most -= 2 * page * num_pools
        if self.config.max_kv is not None:
            most = min(most, self.config.max_kv)
        return min(self._ranks.gather(most)), static

    def open(
        self, num_blocks: int, block_bytes: int, block_tokens: int, window: int | None = None
    ) -> Any:
        """Make a pool of tokens: join the ledgers if it is the first, and reserve its arena; every
        rank calls this at the same time. Pools are numbered as they are made.

        Args:
            num_blocks: virtual blocks, the padding block (0) among them.
            block_bytes: of one block, on this rank.
            block_tokens: tokens of one block.
            window: the last tokens of a request the pool keeps; None: all.

        Returns:
            The arena as a DLPack object: int8, shape ``[num_blocks * block_bytes]``.

        Raises:
            ConfigError: the memory is not there, or the policy refuses; on every rank.
        """
        self._block_tokens = block_tokens
        page = page_size(self._describe(), self.config)
        kind = Tokens(block_tokens, window, self._chunk)
        (arena,) = self._open([ArenaShape(num_blocks, block_bytes, page)], kind)
        return arena.raw_tensor()

    def open_states(
        self, num_slots: int, sizes: Sequence[tuple[int, int]], per_request: int
    ) -> list[Any]:
        """Make a pool of states that are kept for requests, not tokens; otherwise as :meth:`open`.

        Args:
            num_slots: virtual slots, the padding slot (0) among them.
            sizes: bytes of one slot in a layer, and layers, of every tensor there is.
            per_request: slots a request may hold at once.

        Returns:
            For every tensor a DLPack object: int8, shape ``[layers, num_slots * bytes]``.
        """
        # A slot has pages in every layer.
        page = page_size(self._describe(), self.config, least=True)
        shapes = [ArenaShape(num_slots, size, page, segments=layers) for size, layers in sizes]
        return [arena.raw_segments() for arena in self._open(shapes, States(per_request))]

    def state_bytes(self, sizes: Sequence[tuple[int, int]], slots: int) -> int:
        """What so many slots of :meth:`open_states` may take, besides the padding slot."""
        page = page_size(self._describe(), self.config, least=True)
        # In every layer the padding slot's pages, and one more that slots fill in part.
        return sum(layers * (slots * size + 2 * max(page, size)) for size, layers in sizes)

    def _describe(self) -> RankDevice:
        return describe(self._backend, self.kind, self.config, self._static_bytes)

    def _open(self, shapes: list[ArenaShape], kind: PoolKind) -> list[WorkerArena]:
        found: list[tuple[RankDevice, list[ArenaShape]]]
        found = self._ranks.gather((self._describe(), shapes))
        bindings: list[WorkerBinding] | str = ""
        if self._ranks.rank == 0:
            bindings = self._join(found, kind)
        bindings = self._ranks.broadcast(bindings)
        if isinstance(bindings, str):
            raise ConfigError(bindings)
        begin = self._ranks.rank * len(shapes)
        own = bindings[begin : begin + len(shapes)]
        arenas = [WorkerArena(self._backend, binding) for binding in own]
        if self.kind != "host" and self._static is None:
            moved = 0 if self.sleep is None else self.sleep.num_bytes
            self._static = follow_static(arenas[0], self._describe(), moved=moved)
        if self._leader is None:
            all_shapes = {shape for _, theirs in found for shape in theirs}
            distinct = sorted(all_shapes, key=lambda s: s.block_bytes * s.segments, reverse=True)
            copy = Copy(BlockAllocator(shapes[0].num_blocks, [geometry_of(s) for s in distinct]))
            self._replica = self._replica or Replica()
            self._replica.pools.append(copy)
        self._pools.append(RankPool(arenas, kind))
        return arenas

    def _join(
        self, found: list[tuple[RankDevice, list[ArenaShape]]], kind: PoolKind
    ) -> list[WorkerBinding] | str:
        shapes = [shape for _, theirs in found for shape in theirs]
        try:
            if self._joined is not None:
                return self._joined.add_pool(
                    shapes,
                    holding=kind.holding,
                    logger=logger,
                )
            self._joined = join(
                self.config,
                shapes,
                [device for device, _ in found],
                holding=kind.holding,
                zero_recycled=[False] * len(shapes),
                logger=logger,
            )
        except (ConfigError, VmmError) as error:
            return str(error)  # for the other ranks, which wait for an answer
        self._leader = Leader(self._joined.scheduler, self._ranks.size)
        return [binding for binding in self._joined.bindings if binding is not None]

    @property
    def num_pools(self) -> int:
        """Pools made so far."""
        return len(self._pools)

    @property
    def allocator(self) -> BlockAllocator:
        """This rank's block allocator of the first pool; block 0 is the padding page."""
        return self.allocator_of(0)

    def allocator_of(self, pool: int) -> BlockAllocator:
        """This rank's block allocator of a pool."""
        if self._leader is not None:
            return self._leader.scheduler.pools[pool].allocator
        assert self._replica is not None
        return self._replica.pools[pool].allocator

    def room(self, pool: int) -> Room:
        """What this pass may count on in a pool."""
        return self.order.room(pool)

    @property
    def scheduler(self) -> ElasticScheduler | None:
        """The scheduler half, on the first rank."""
        return self._leader.scheduler if self._leader is not None else None

    def pages_filled(self, num_blocks: int, pool: int = 0) -> int:
        """Whole pages in so many blocks of a pool."""
        return pages_filled(self.allocator_of(pool), num_blocks)

    def attach(self, engine: Any) -> None:
        """The engine's scheduler, once it has its queues."""
        self._engine = engine

    def set_cache(self, cache: CachedBlocks, pool: int = 0) -> None:
        """What the engine's prefix cache keeps in a pool, once there is one."""
        if self._leader is not None:
            self._leader.scheduler.pools[pool].cache = cache
        elif self._replica is not None:
            self._replica.pools[pool].cache = cache

    # -- every pass -----------------------------------------------------------

    def send(self, received: list[Any] | None) -> list[Any] | None:
        """On the first rank: plan the pass, and add what the others need to know.

        Args:
            received: requests that came in for this pass; None on the other ranks.
        """
        if self._leader is None or received is None:
            return received
        if self.asleep:
            self._look()  # orders are acknowledged; nothing is taken
            return received
        # In the same passes on every rank: what is freed at once is reused in another order than
        # what is freed one after the other.
        self.land()
        load = load_of(self._engine, received, self._block_tokens, self._kinds())
        busy, self._busy = self._busy, load is not None
        # Once more when nothing is left to do: its last request may have been given up waiting.
        if not self._look() and load is None and not busy:
            return received
        before = self.order
        nothing = Load((), (), (Need(0, 0, 0),) * len(self._pools))
        self.order, ops = self._leader.plan(load or nothing)
        self._apply(ops)
        if self._ranks.size > 1 and (self.order.acts or replace(before, acts=()) != self.order):
            return [*received, self.order]
        return received

    def spare(self) -> int:
        """Bytes of this rank that nothing needs until it computes again."""
        if self._static is None:
            return 0
        arenas = [arena for pool in self._pools for arena in pool.arenas]
        return self._static.spare(sum(arena.committed_bytes for arena in arenas))

    def note_away(self, num_bytes: int) -> None:
        """So many bytes of this rank's weights are not on the device now."""
        if self._static is not None:
            self._static.set_away(num_bytes)

    @property
    def asleep(self) -> bool:
        """Whether requests have to wait until the engine is resumed."""
        return self.sleep is not None and self.sleep.asleep

    def give_all(self) -> None:
        """Give all KV memory back that no request uses; on every rank at the same time."""
        self.land()
        if self._leader is not None:
            scheduler = self._leader.scheduler
            journal = scheduler.acts.journal = []
            ops = scheduler.give_all()
            self._ranks.broadcast(PassOrder(tuple(journal)))
        else:
            assert self._replica is not None
            ops = self._replica.repeat(self._ranks.broadcast(None))
        for pool, theirs in zip(self._pools, (ops, *ops.others), strict=True):
            for arena in pool.arenas:
                arena.apply_now(theirs)

    def _kinds(self) -> list[PoolKind]:
        """What the pools are, with what is held of them now."""
        assert self._leader is not None
        pools = zip(self._pools, self._leader.scheduler.pools, strict=True)
        return [
            replace(own.kind, held=pool.allocator.num_live - 1 - pool.num_cached)
            if isinstance(own.kind, States)
            else own.kind
            for own, pool in pools
        ]

    def receive(self, received: list[Any]) -> list[Any]:
        """On every rank: take the order out of what was received, and carry it out."""
        self.land()  # also without an order: at the same time on every rank
        self._passes += 1
        if not received or not isinstance(received[-1], PassOrder):
            return received
        if self._replica is not None:
            self.order = received[-1]
            self._apply(self._replica.repeat(self.order))
        return received[:-1]

    def _apply(self, ops: StepOps) -> None:
        for pool, theirs in zip(self._pools, (ops, *ops.others), strict=True):
            for arena in pool.arenas:
                arena.apply(theirs)
        if self._static is not None:
            arenas = [arena for pool in self._pools for arena in pool.arenas]
            self._static.refresh(sum(arena.committed_bytes for arena in arenas))

    def _look(self) -> bool:
        """Whether an idle engine has something to do, looked at with news or now and then."""
        assert self._leader is not None
        if self._waker is not None:
            self._waker.drain()
        scheduler = self._leader.scheduler
        now = time.monotonic()
        bell = scheduler.accounts.bell_count()
        if bell == self._heard and now - self._looked_at < _LOOK_S:
            return False
        self._heard, self._looked_at = bell, now
        if self._metrics is not None and now - self._exported_at >= _METRICS_S:
            self._exported_at = now
            if (told := scheduler.stats()) is not None:
                self._metrics.update(told)
        return scheduler.attend()

    def pause(self) -> bool:
        """Requests wait and nothing can run: wait a moment for memory.

        Called on every rank, in the same passes.

        Returns:
            Whether that has been so for long: then a request that waits between two chunks should
            give up what it holds, since others may wait for just that.
        """
        self._stuck = self._stuck + 1 if self._stuck_at == self._passes - 1 else 1
        self._stuck_at = self._passes
        if self._leader is not None:
            self._leader.scheduler.pause(_PAUSE_MS)
        return self._stuck % _STUCK_PASSES == 0

    def expose(self, labels: Mapping[str, str]) -> None:
        """Add kvcached's series to the engine's metrics."""
        if self._leader is not None:
            # Not before: prometheus_client looks once, when it is imported, whether the processes
            # share their metrics, and SGLang says so after it has looked at its arguments.
            from .engine_metrics import EngineMetrics

            self._metrics = EngineMetrics("sglang:kvcached_", labels)

    def count(self, name: str, num_tokens: int) -> None:
        """Count cached tokens as blocks: ``cache_hits`` or ``cache_evictions``."""
        if self._leader is not None:
            self._leader.scheduler.counters[name] += num_tokens // self._block_tokens

    def wake_fd(self) -> int | None:
        """A descriptor that is readable when a sleeping engine has something to do."""
        if self._leader is None:
            return None
        self._waker = Waker()
        self._leader.scheduler.watch(self._waker.wake)
        return self._waker.fd

    def close(self) -> None:
        """Leave the ledgers and release the arenas."""
        if self._leader is not None:
            self._leader.scheduler.close()
        for pool in self._pools:
            for arena in pool.arenas:
                arena.close()
        self._pools = []
        if self.sleep is not None:
            self.sleep.close()


def _chunk(server_args: Any) -> int | None:
    """Tokens of a prefill at most; None for no bound."""
    size = getattr(server_args, "chunked_prefill_size", None)
    return size if size and size > 0 else None
