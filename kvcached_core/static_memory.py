# SPDX-License-Identifier: Apache-2.0
"""What an engine holds beside its KV cache, kept true in the ledger while it runs."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable

from .devices import open_usage
from .plan import RankDevice
from .worker import WorkerArena

_PERIOD_S = 0.1
_CONTEXT_BYTES = 512 << 20
"""What a process has on a GPU outside its framework's allocator, where nobody can tell."""


class StaticMemory:
    """Follows a worker's own memory, since what was profiled at start is not the whole of it.

    A CUDA context and the libraries' workspaces come on top, and the framework's allocator keeps
    more than its peak as blocks of new sizes come. Untold, neighbours would lease those bytes.

    Args:
        registered: bytes at start: weights, the profiled peak of activations, graphs.
        reserved: bytes the framework's allocator holds now.
        process: bytes of this process on the device, or None if the driver does not say.
        publish: tells the ledger.
        to_come: likewise, what of that the driver does not count yet. Nobody else may lease it,
            whatever else is on the device.
        guessed: likewise, what of that is a guess, and the driver's figure has as it is.
        graphs: of ``registered``, what was reckoned for graphs that are captured after this. If the
            allocator has not grown by as much then, the rest was somebody else's: an engine
            reckons from what the whole device has left, and a neighbour may have been loading.
        empty: has the framework's allocator give back what it holds for reuse.
    """

    def __init__(
        self,
        registered: int,
        reserved: Callable[[], int],
        process: Callable[[], int | None],
        publish: Callable[[int], object],
        to_come: Callable[[int], object],
        guessed: Callable[[int], object],
        graphs: int = 0,
        empty: Callable[[], object] = lambda: None,
    ) -> None:
        self._registered = registered
        self._empty = empty
        self._graphs = graphs
        self._reserved_before = reserved() if graphs else 0
        self._reserved = reserved
        self._process = process
        self._publish = publish
        self._publish_to_come = to_come
        self._publish_guessed = guessed
        self._beside: int | None = None
        self._published = registered
        self._looked_at = -math.inf
        self._away = 0
        self._to_come = -1
        self._tell_to_come(reserved())

    def set_away(self, num_bytes: int) -> None:
        """So much of what the framework's allocator holds has no memory now.

        The ledger is told by the scheduler half, which has room for what comes back first.
        """
        self._published -= num_bytes - self._away
        self._away = num_bytes
        if num_bytes:  # what comes back with a wake is leased first, and told at the next look
            self._tell_to_come(self._reserved())

    def spare(self, committed: int) -> int:
        """Of what is registered, the bytes this process can do without until it computes again.

        Args:
            committed: bytes of the process that are KV cache.
        """
        self._empty()
        self._looked_at = -math.inf
        self.refresh(committed)
        return max(0, self._registered - self._reserved())

    def refresh(self, committed: int) -> None:
        """Look again, at most every 100 ms.

        Args:
            committed: bytes of the process that are KV cache.
        """
        now = time.monotonic()
        if now - self._looked_at < _PERIOD_S:
            return
        self._looked_at = now
        reserved = self._reserved()
        guess = False
        if self._beside is None:  # once: the driver takes its time to answer
            total = self._process()
            mapped = reserved - self._away
            guess = total is None
            outside = _CONTEXT_BYTES if total is None else total - mapped - committed
            self._beside = max(0, outside)
            grown = max(0, reserved - self._reserved_before)
            self._registered -= self._graphs - min(self._graphs, grown)
        held = max(self._registered, reserved) + self._beside - self._away
        if held != self._published:
            self._publish(held)
            self._published = held
        if guess:
            self._publish_guessed(_CONTEXT_BYTES)
        self._tell_to_come(reserved)

    def _tell_to_come(self, reserved: int) -> None:
        more = 0 if self._away else max(0, self._registered - reserved)
        if more != self._to_come:
            self._publish_to_come(more)
            self._to_come = more


def follow_static(
    arena: WorkerArena, device: RankDevice, graphs: int = 0, *, moved: int = 0
) -> StaticMemory:
    """Follows this process on ``device``, whose KV cache is ``arena``; see `StaticMemory`.

    Args:
        moved: bytes of weights that the framework's allocator no longer holds.
    """
    usage = open_usage(device)
    # The engine has it loaded; the core itself does without.
    cuda = sys.modules["torch"].cuda
    return StaticMemory(
        device.static_bytes,
        lambda: int(cuda.memory_reserved()) + moved,
        lambda: None if usage is None else usage.process_bytes(os.getpid()),
        arena.set_static,
        lambda num_bytes: arena.set_to_come(num_bytes, usage),
        arena.set_guessed,
        graphs,
        lambda: (gc.collect(), cuda.empty_cache()),
    )
