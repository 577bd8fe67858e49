# SPDX-License-Identifier: Apache-2.0
"""One engine as the router sees it: its load, its health, and its connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import Callable, Iterator

import aiohttp
import httpx
import yarl

from .engines import Engine, EngineError, connect
from .gate import Gate
from .launch.command import Recipe
from .launch.engine import Kind, LaunchedEngine
from .launch.supervisor import Supervisor
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
        self,
        settings: ReplicaSettings,
        gate: Gate,
        connect_s: float,
        key: str | None,
        recipe: Recipe | None = None,
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
        self.level = 0
        """At which the router put it to sleep; 0: it did not."""
        self.supervisor: Supervisor | None = None
        """Of its process, if the router runs that."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when it may have become available, or ceased to be."""
        self.changing = asyncio.Lock()
        """Held while it is put to sleep or woken, or asked which it is."""
        self.problem = ""
        """Why it is left out."""
        # What is asked beside requests.
        self._control = httpx.AsyncClient(
            base_url=settings.url,
            headers=self._authorization(key),
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(keepalive_expiry=_KEEP_IDLE_S),
            verify=_tls(),
            # The environment's proxies are not for engines.
            trust_env=False,
            follow_redirects=False,
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_S, ssl=_tls()),
            headers=self._authorization(key),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            auto_decompress=False,
            trust_env=False,
        )
        self.engine: Engine = connect(settings, self._control)
        self._key = key
        self._recipe = recipe
        self._failures = 0
        self._look_now = asyncio.Event()

    @staticmethod
    def _authorization(key: str | None) -> dict[str, str] | None:
        return {"authorization": f"Bearer {key}"} if key else None

    async def send(
        self, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> aiohttp.ClientResponse:
        """Its answer to a POST, of which only the head is there.

        Raises:
            aiohttp.ClientError: it was not reached, or ended.
        """
        url = yarl.URL(self.settings.url + path, encoded=True)
        return await self._session.post(url, headers=headers, data=body, allow_redirects=False)

    @property
    def awake(self) -> bool:
        """Whether it is known to be."""
        return self.asleep is False

    @property
    def available(self) -> bool:
        """Whether it may be given requests."""
        return self.healthy and self.awake

    @property
    def coming(self) -> bool:
        """Whether its process is there or about to be, and it may become available by itself."""
        return self.supervisor is not None and self.supervisor.wanted

    @property
    def down(self) -> bool:
        """Whether its process is the router's to start, and was not asked to run."""
        return self.supervisor is not None and not self.supervisor.wanted

    @property
    def crashes(self) -> int:
        """How often its process ended by itself, if the router runs that."""
        return 0 if self.supervisor is None else self.supervisor.crashes

    @property
    def usable(self) -> bool:
        """Whether it could serve a request, if need be after it was woken."""
        return self.healthy or (self.down and self.asleep is True)

    def launch_with(self, supervisor: Supervisor, kind: Callable[[], Kind]) -> None:
        """Have its process run by ``supervisor``."""
        self.supervisor = supervisor
        self.engine = LaunchedEngine(self.engine, supervisor, kind)
        self.healthy = False
        self.problem = supervisor.problem

    def process_changed(self) -> None:
        """Note that its process became ready, or is no longer."""
        assert self.supervisor is not None
        if self.supervisor.ready:
            self.asleep = False
            self.succeeded()
        else:
            self.healthy = False
            self.problem = self.supervisor.problem
        self.on_change()

    def same_as(self, settings: ReplicaSettings, key: str | None, recipe: Recipe | None) -> bool:
        """Whether nothing but its queue is different; ``recipe``: what its process is made of."""
        same = settings.model_copy(update={"gpu": self.settings.gpu}) == self.settings
        return same and key == self._key and recipe == self._recipe

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
            self.on_change()

    def succeeded(self) -> None:
        """It answered."""
        if self.supervisor is not None and not self.supervisor.ready:
            return  # with its last words
        if not self.healthy:
            log.info("replica %s is back", self.name)
        self._failures = 0
        came = not self.healthy
        self.healthy = True
        self.problem = ""
        if came:
            self.on_change()

    async def look(self, health: HealthSettings) -> None:
        """Probe it once, unless that is its supervisor's task."""
        if self.supervisor is None:
            with contextlib.suppress(EngineError):
                await self.probe(health, health.timeout)

    async def probe(self, health: HealthSettings, timeout: float) -> None:
        """Ask it whether it is well, and note the answer.

        Args:
            health: how many that fail in a row leave it out.
            timeout: seconds for it to answer.

        Raises:
            EngineError: it is not.
        """
        try:
            await self.engine.check(timeout, asleep=not self.awake)
        except EngineError as error:
            self._count(str(error), health.failures)
            raise
        self.succeeded()

    async def pause(self, interval: float) -> None:
        """Wait until the next probe is due, in seconds: at once after a request failed."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._look_now.wait(), interval)
        self._look_now.clear()

    @property
    def closed(self) -> bool:
        """Whether it has no connections any more."""
        return self._control.is_closed and self._session.closed

    async def close(self) -> None:
        """End its process, if the router runs it, and the connections."""
        if self.supervisor is not None:
            await self.supervisor.stop("it is taken away")
        # Not in the middle of falling asleep, or of a question: that would be taken for a failure.
        async with self.changing:
            await self._control.aclose()
            await self._session.close()
