# SPDX-License-Identifier: Apache-2.0
"""An engine that the router runs, as the models see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..engines import Engine, EngineError
from .supervisor import Supervisor

Kind = Literal["engine", "cold"]


class LaunchedEngine(Engine):
    """Sleeps as its engine does, or by not running (``cold``)."""

    def __init__(self, inner: Engine, supervisor: Supervisor, kind: Callable[[], Kind]) -> None:
        self._inner = inner
        self._supervisor = supervisor
        self._kind = kind
        self._rests = False
        """It was put to sleep by its own means, whatever is configured now."""

    async def check(self, timeout: float, asleep: bool = False) -> None:
        if not self._supervisor.ready:
            raise EngineError(self._supervisor.problem)
        await self._inner.check(timeout, asleep)

    async def is_asleep(self, timeout: float) -> bool | None:
        if not self._supervisor.wanted:
            return True
        if self._supervisor.ready and self._may_rest:
            return await self._inner.is_asleep(timeout)
        # A start ends with an engine that is awake.
        return False

    async def sleep(self, level: int, timeout: float) -> None:
        if self._kind() == "cold" or not self._supervisor.ready:
            await self._supervisor.stop("it sleeps")
        else:
            self._rests = True
            await self._inner.sleep(level, timeout)

    async def wake(self, level: int, timeout: float) -> None:
        """Start it if it does not run, in the time for starts and not in ``timeout``."""
        if self._supervisor.ready and self._may_rest:
            await self._inner.wake(level, timeout)
        else:
            await self._supervisor.started()
        self._rests = False

    @property
    def _may_rest(self) -> bool:
        return self._rests or self._kind() == "engine"
