# SPDX-License-Identifier: Apache-2.0
"""An engine that the router runs, as the models see it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from ..engines import Engine, EngineError, NotNow, Unsupported
from .supervisor import Supervisor

log = logging.getLogger(__name__)
_ATTEMPTS = 3
"""To wake an engine, before it is started anew instead."""
Kind = Literal["engine", "cold"]


class LaunchedEngine(Engine):
    """Sleeps as its engine does, or by not running (``cold``)."""

    def __init__(self, inner: Engine, supervisor: Supervisor, kind: Callable[[], Kind]) -> None:
        self._inner = inner
        self._supervisor = supervisor
        self._kind = kind
        self._rests = False
        """It was put to sleep by its own means, whatever is configured now."""
        self._failed = 0
        """Attempts to wake it, one after the other."""

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
            try:
                await self._inner.sleep(level, timeout)
            except Unsupported:
                raise
            except EngineError as error:
                if await self._supervisor.fate.is_sealed():
                    self._supervisor.end_run(f"it did not fall asleep: {error}")
                raise

    async def wake(self, level: int, timeout: float) -> None:
        """Start it if it does not run, in the time for starts and not in ``timeout``.

        The same for one that cannot wake any more: a fault has taken its GPU context, which a
        process notices only when it next computes, or it failed several times in a row.
        """
        if self._supervisor.ready and self._may_rest:
            try:
                await self._inner.wake(level, timeout)
            except NotNow:
                raise
            except EngineError as error:
                self._failed += 1
                if self._failed < _ATTEMPTS and not await self._supervisor.fate.is_sealed():
                    raise
                log.warning("engine %s is started anew: %s", self._supervisor.name, error)
                await self._supervisor.start_anew(f"it did not wake: {error}")
        else:
            await self._supervisor.started()
        self._failed = 0
        self._rests = False

    @property
    def _may_rest(self) -> bool:
        return self._rests or self._kind() == "engine"
