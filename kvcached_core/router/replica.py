# SPDX-License-Identifier: Apache-2.0
"""One engine as the router sees it: its load, its health, and its connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import Iterator

import httpx

from .engines import Engine, EngineError, connect
from .gate import Gate
from .settings import HealthSettings, ReplicaSettings

log = logging.getLogger(__name__)
# Below the 5 s after which engines close idle connections: a request must not meet that.
_KEEP_IDLE_S = 2.0


@functools.cache
def _tls() -> ssl.SSLContext:
    # One for all: reading the certificates takes tens of milliseconds.
    return ssl.create_default_context()


class Replica:
    """An engine that serves a model. Left out while unhealthy, and back when it is well."""

    def __init__(
        self, settings: ReplicaSettings, gate: Gate, connect_s: float, key: str | None
    ) -> None:
        self.settings = settings
        self.gate = gate
        self.name = settings.url
        self.load = 0
        """Requests it has or that wait for it."""
        self.healthy = True
        self.asleep: bool | None = False
        """None: an attempt to change that ended badly, or nobody could tell."""
        self.changed = False
        """Whether the router ever put it to sleep."""
        self.changing = asyncio.Lock()
        """Held while it is put to sleep or woken."""
        self.problem = ""
        """Why it is left out."""
        self.client = httpx.AsyncClient(
            base_url=settings.url,
            headers={"authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=256,
                keepalive_expiry=_KEEP_IDLE_S,
            ),
            verify=_tls(),
            # The environment's proxies are not for engines.
            trust_env=False,
            follow_redirects=False,
        )
        self.engine: Engine = connect(settings, self.client)
        self._key = key
        self._failures = 0
        self._look_now = asyncio.Event()

    @property
    def awake(self) -> bool:
        """Whether it is known to be."""
        return self.asleep is False

    @property
    def available(self) -> bool:
        """Whether it may be given requests."""
        return self.healthy and self.awake

    def same_as(self, settings: ReplicaSettings, key: str | None) -> bool:
        """Whether nothing but its queue is different."""
        same = settings.model_copy(update={"gpu": self.settings.gpu}) == self.settings
        return same and key == self._key

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Counts a request while the block lasts."""
        self.load += 1
        try:
            yield
        finally:
            self.load -= 1

    def failed(self, problem: str, health: HealthSettings, *, certain: bool = False) -> None:
        """Note that a request failed; after enough in a row, or if certain, it is left out."""
        self._count(problem, 1 if certain else health.failures)
        self._look_now.set()

    def _count(self, problem: str, bound: int) -> None:
        self._failures += 1
        if self._failures >= bound:
            if self.healthy:
                log.warning("replica %s is left out: %s", self.name, problem)
            self.healthy = False
            self.problem = problem

    def succeeded(self) -> None:
        """It answered."""
        if not self.healthy:
            log.info("replica %s is back", self.name)
        self._failures = 0
        self.healthy = True
        self.problem = ""

    async def look(self, health: HealthSettings) -> None:
        """Probe it once."""
        try:
            await self.engine.check(health.timeout)
        except EngineError as error:
            self._count(str(error), health.failures)
        else:
            self.succeeded()

    async def pause(self, health: HealthSettings) -> None:
        """Wait until the next probe is due: at once after a request failed."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._look_now.wait(), health.interval)
        self._look_now.clear()

    async def close(self) -> None:
        await self.client.aclose()
