# SPDX-License-Identifier: Apache-2.0
"""What the router asks of an engine beside answers: health, sleep, and waking up."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

import anyio
import httpx

from .settings import ReplicaSettings


class EngineError(Exception):
    """An engine did not do what it was asked; the message says what and the remedy."""


class Unsupported(EngineError):
    """It cannot do that at all, and goes on as it was."""


class NotNow(EngineError):
    """It is well, and may do so later: others have what it needs."""


class Engine(ABC):
    """One running engine. Each call may take until ``timeout`` seconds are over."""

    @abstractmethod
    async def check(self, timeout: float, asleep: bool = False) -> None:
        """Return if it is healthy.

        Args:
            timeout: seconds.
            asleep: it sleeps, and must not be asked for what needs its memory.

        Raises:
            EngineError: it is not.
        """

    @abstractmethod
    async def is_asleep(self, timeout: float) -> bool | None:
        """Whether it sleeps; None if it cannot tell."""

    @abstractmethod
    async def sleep(self, level: int, timeout: float) -> None:
        """Give back its memory. No request is in flight, and :meth:`check` is told from now on.

        Raises:
            Unsupported: it has no way to sleep.
            EngineError: it may or may not sleep now.
        """

    @abstractmethod
    async def wake(self, level: int, timeout: float) -> None:
        """Be ready for requests again; for one that is awake nothing changes.

        Args:
            level: at which it was put to sleep.
            timeout: seconds.

        Raises:
            NotNow: it sleeps as before, since there is no room for it.
            EngineError: it sleeps as before, as far as one can tell.
        """


class _HttpEngine(Engine):
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def check(self, timeout: float, asleep: bool = False) -> None:
        await self._call("GET", "/health", timeout)

    async def _call(
        self,
        method: str,
        path: str,
        timeout: float,
        params: dict[str, str] | None = None,
        json: object = None,
        remedy: str = "",
    ) -> httpx.Response:
        if self._client.is_closed:
            raise EngineError(f"{self._client.base_url} was taken out of the configuration")
        try:
            # httpx counts the time for each piece of an answer anew.
            with anyio.fail_after(timeout):
                response = await self._client.request(
                    method, path, params=params, json=json, timeout=timeout
                )
        except (httpx.HTTPError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise EngineError(f"{self._client.base_url}: {method} {path}: {reason}") from None
        if response.status_code == 404 and remedy:
            raise Unsupported(f"{self._client.base_url} has no {path}: {remedy}")
        if response.is_error:
            said = response.text[:300].strip()
            kind = NotNow if response.status_code == 503 else EngineError
            raise kind(
                f"{self._client.base_url}: {method} {path}: status {response.status_code} {said}"
            )
        return response


class VllmEngine(_HttpEngine):
    """vLLM, with its endpoints for development."""

    _REMEDY = "start it with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1"

    async def is_asleep(self, timeout: float) -> bool | None:
        try:
            response = await self._call("GET", "/is_sleeping", timeout)
            return bool(response.json()["is_sleeping"])
        except (EngineError, ValueError, KeyError, TypeError, RecursionError):
            return None

    async def sleep(self, level: int, timeout: float) -> None:
        # Not the default mode, which aborts requests: somebody may ask the engine directly.
        params = {"level": str(level), "mode": "wait"}
        await self._call("POST", "/sleep", timeout, params=params, remedy=self._REMEDY)

    async def wake(self, level: int, timeout: float) -> None:
        if level == 1:
            await self._call("POST", "/wake_up", timeout, remedy=self._REMEDY)
            return
        # The weights were dropped: waking up only makes room for them.
        for path, tags, body in (
            ("/wake_up", "weights", None),
            ("/collective_rpc", None, {"method": "reload_weights"}),
            ("/wake_up", "kv_cache", None),
        ):
            params = {"tags": tags} if tags else None
            await self._call("POST", path, timeout, params, body, self._REMEDY)


class SglangEngine(_HttpEngine):
    """SGLang, which does not tell whether it sleeps."""

    _REMEDY = "start it with --enable-memory-saver"

    def __init__(self, client: httpx.AsyncClient) -> None:
        super().__init__(client)
        self._probes = 0
        self._quiet = asyncio.Event()
        """Set while it has none of our probes."""
        self._quiet.set()

    async def check(self, timeout: float, asleep: bool = False) -> None:
        # /health generates a token, for which there is no memory while it sleeps.
        if asleep:
            await self._call("GET", "/model_info", timeout)
            return
        self._probes += 1
        self._quiet.clear()
        try:
            await self._call("GET", "/health", timeout)
        finally:
            self._probes -= 1
            if not self._probes:
                self._quiet.set()

    async def is_asleep(self, timeout: float) -> bool | None:
        return None

    async def sleep(self, level: int, timeout: float) -> None:
        # The token of a probe is a request in flight, under which it does not sleep, or even ends.
        await self._quiet.wait()
        await self._require(level, timeout)
        body = {} if level == 1 else {"level": level}
        path = "/release_memory_occupation"
        await self._call("POST", path, timeout, json=body, remedy=self._REMEDY)

    async def _require(self, level: int, timeout: float) -> None:
        """Its endpoints are there however it was started, and answer 200."""
        remedy = "use a release that tells how it was started"
        response = await self._call("GET", "/server_info", timeout, remedy=remedy)
        try:
            known = response.json()
            ours = bool(known.get("kvcached_sleep"))
            saves = bool(known.get("enable_memory_saver"))
            keeps = bool(known.get("enable_weights_cpu_backup"))
        except (ValueError, AttributeError, RecursionError):
            raise EngineError(f"{self._client.base_url}: GET /server_info: no such") from None
        if ours:
            return
        problem = ""
        if not saves:
            problem = f"would keep its memory: {self._REMEDY}"
        elif level == 2:
            problem = "would not load its weights again: use level 1, or --enable-kvcached"
        elif not keeps:
            problem = "would lose its weights: start it with --enable-weights-cpu-backup"
        if problem:
            raise Unsupported(f"{self._client.base_url} {problem}")

    async def wake(self, level: int, timeout: float) -> None:
        path = "/resume_memory_occupation"
        await self._call("POST", path, timeout, json={}, remedy=self._REMEDY)


def connect(settings: ReplicaSettings, client: httpx.AsyncClient) -> Engine:
    """The engine behind ``client``."""
    return SglangEngine(client) if settings.engine == "sglang" else VllmEngine(client)
