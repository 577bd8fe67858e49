# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is to start: so many engines of one GPU at a time, in the order they asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import anyio

from ..settings import GpuSettings


class Turns:
    """Of all GPUs. How many may start at a time can change while some do."""

    def __init__(self) -> None:
        self._limits: dict[str, anyio.CapacityLimiter] = {}

    def configure(self, gpus: Mapping[str, GpuSettings]) -> None:
        """Take other settings; who is starting goes on, also if they are more than now allowed."""
        for name, limit in self._limits.items():
            if name in gpus:
                limit.total_tokens = gpus[name].parallel_starts

    def of(self, place: Callable[[], tuple[str, GpuSettings]]) -> Turn:
        """The turn of one engine; ``place``: the GPU where it is to start, by its name."""

        def find() -> anyio.CapacityLimiter:
            name, settings = place()
            if name not in self._limits:
                self._limits[name] = anyio.CapacityLimiter(settings.parallel_starts)
            return self._limits[name]

        return Turn(find)


class Turn:
    """Held by an engine while it starts."""

    def __init__(self, find: Callable[[], anyio.CapacityLimiter]) -> None:
        self._find = find
        self._limit: anyio.CapacityLimiter | None = None

    async def acquire(self) -> None:
        """Wait for it."""
        limit = self._find()
        await limit.acquire_on_behalf_of(self)
        self._limit = limit

    def release(self) -> None:
        """Let the next one start."""
        assert self._limit is not None
        self._limit.release_on_behalf_of(self)
        self._limit = None
