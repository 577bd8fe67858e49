# SPDX-License-Identifier: Apache-2.0
"""Engines as clients of MPS: their environment, and their common fate.

A fatal fault of one client ends the contexts of all clients of the server. Some of the engines
notice at once and end, an idle one only when it next computes, and as long as one of them is left
the server takes no new client. So after such a fault all of them are ended, and then started in the
order of the configuration.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...config import Config, ConfigError
from ...mps import Mps, MpsError, Server, Status, client_environment
from ..engines import EngineError
from ..settings import GpuSettings
from .supervisor import Phase, Supervisor

log = logging.getLogger(__name__)
SETTLE_S = 2.0
"""After an engine's end, for others to end of the same fault."""
_FREE_S = 30.0
_LOOK_S = 0.25
_STEP_S = 0.01
_FAULT = "FAULT"


class Daemon(Protocol):
    """What is used of :class:`~kvcached_core.mps.Mps`."""

    def start(self) -> int: ...

    def status(self) -> Status: ...

    def stop(self) -> bool: ...


@dataclass(eq=False)
class _Client:
    supervisor: Supervisor
    rank: int = 0
    """Its place in the configuration."""
    uses: bool = False
    """Its present process is a client."""
    devices: frozenset[str] = frozenset()
    """GPUs it has; none if that is not known."""


@dataclass(frozen=True)
class _End:
    """Of a client, unasked."""

    client: _Client
    said: str
    at: float
    """Of the loop's clock."""


class MpsGuard:
    """All engines of one router that are clients of this user's daemon."""

    def __init__(self, daemon: Callable[[], Daemon] = Mps, settle_s: float = SETTLE_S) -> None:
        self._make = daemon
        self._settle_s = settle_s
        self._clients: list[_Client] = []
        self._waiting: list[tuple[_Client, asyncio.Future[None]]] | None = None
        """Who wants to start while a fault is dealt with; None: there is none."""
        self._task: asyncio.Task[None] | None = None
        self._ended: list[_End] = []
        """Those nobody has looked into yet."""
        self._lasting: frozenset[str] = frozenset()
        """GPUs whose fault the server still reports although our engines there were ended."""
        self._started = False
        self._said_without = False
        self.faults = 0
        """Faults of one client that ended others."""

    async def environment(
        self, client: _Client, gpu: GpuSettings, variables: dict[str, str]
    ) -> dict[str, str]:
        """What makes the next process of ``client`` one of MPS; starts the daemon if need be.

        Args:
            client: of :meth:`join`.
            gpu: where it runs.
            variables: its environment, with the settings of kvcached.

        Raises:
            EngineError: MPS is wanted and cannot be had.
        """
        client.uses = False
        if gpu.mps is False:
            return {}
        daemon = self._make()
        try:
            running = await asyncio.to_thread(lambda: daemon.status().pid)
            await asyncio.to_thread(daemon.start)
            config = Config.load(environ=variables)
        except MpsError as error:
            if gpu.mps is True:
                raise EngineError(f"MPS is configured: {error}") from None
            if not self._said_without:
                log.info("engines are launched without MPS: %s", error)
                self._said_without = True
            return {}
        except ConfigError as error:
            raise EngineError(str(error)) from None
        self._started |= running is None
        client.uses = True
        visible = variables.get("CUDA_VISIBLE_DEVICES", "")
        client.devices = frozenset(name for name in visible.split(",") if name)
        return client_environment(config, devices=range(max(1, len(client.devices))))

    def join(self, supervisor: Supervisor, gpu: Callable[[], GpuSettings]) -> None:
        """Note an engine, whose fate this becomes; ``gpu``: its settings at that time."""
        client = _Client(supervisor)
        self._clients.append(client)
        supervisor.fate = _Shared(self, client, gpu)

    def leave(self, supervisor: Supervisor) -> None:
        """Forget one that is gone for good."""
        self._clients = [client for client in self._clients if client.supervisor is not supervisor]

    def arrange(self, order: list[Supervisor]) -> None:
        """Take the order in which engines are started again."""
        ranks = {id(supervisor): rank for rank, supervisor in enumerate(order)}
        for client in self._clients:
            client.rank = ranks.get(id(client.supervisor), len(ranks))

    async def clear(self, client: _Client) -> None:
        """Wait until no fault is being dealt with."""
        while self._waiting is not None:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((client, turn))
            await turn

    def ended(self, client: _Client, said: str) -> None:
        """Note that a client ended unasked; nobody starts until it is known what that means."""
        if not client.uses:
            return
        client.uses = False
        now = asyncio.get_running_loop().time()
        self._ended.append(_End(client, said, now))
        if self._waiting is None:
            self._waiting = []
            self._task = asyncio.create_task(self._look(), name="mps: what ended an engine")

    async def is_sealed(self, client: _Client) -> bool:
        """Whether the server reports a fault that may have taken the client's GPU context."""
        return client.uses and bool(await self._bad()) and not self._is_explained([client])

    async def stop(self) -> None:
        """End the daemon if this router started it and nobody uses it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._started:
            try:
                await asyncio.to_thread(self._make().stop)
            except MpsError as error:
                log.info("the MPS daemon goes on: %s", error)

    # -- a fault -----------------------------------------------------------------------------------

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        cleared: frozenset[str] = frozenset()
        try:
            while self._ended:
                await asyncio.sleep(self._ended[0].at + self._settle_s - loop.time())
                shared = self._sharing(self._ended[0].client)
                ended = [end for end in self._ended if end.client in shared]
                self._ended = [end for end in self._ended if end.client not in shared]
                faulted = bool(await self._bad()) and not self._is_explained(shared)
                # One that ended without the server's minding it is nobody else's business.
                if faulted or len(ended) > 1:
                    cleared = cleared.union(*(client.devices for client in shared))
                    seen = loop.time()
                    await self._end_all(ended, [c for c in shared if c.uses], faulted)
                    await self._until_free(cleared, seen)
        except Exception:
            log.exception("whether a fault ended several engines could not be found out")
        finally:
            self._ended.clear()
            waiting, self._waiting = self._waiting or [], None
            # They ask for their turns to start in the order in which they go on here.
            for _, turn in sorted(waiting, key=lambda entry: entry[0].rank):
                if not turn.done():
                    turn.set_result(None)

    async def _bad(self) -> list[Server]:
        """Servers that report a fault. They do not say on which GPU."""
        status = await self._status()
        bad = [server for server in status.servers if _FAULT in server.state.upper()]
        if not bad:
            self._lasting = frozenset()
        return bad

    def _is_explained(self, shared: list[_Client]) -> bool:
        """Whether the fault that is reported is known to be one of other GPUs than theirs."""
        known = all(client.devices for client in shared)
        ours = frozenset().union(*(client.devices for client in shared))
        return known and bool(self._lasting) and not ours & self._lasting

    def _sharing(self, first: _Client) -> list[_Client]:
        """``first`` and all whom its fault reaches over common GPUs, in the order of starts."""
        found = [first]
        for client in found:
            found += [
                other
                for other in self._clients
                if other not in found
                and (other.uses or any(other is end.client for end in self._ended))
                and (not other.devices or not client.devices or other.devices & client.devices)
            ]
        return sorted(found, key=lambda client: client.rank)

    async def _end_all(self, ended: list[_End], left: list[_Client], faulted: bool) -> None:
        self.faults += 1
        first = ended[0].client
        log.error(
            "a fatal fault of one MPS client ended the GPU contexts of all: %s ended first (%s), "
            "ended: %s, ended now: %s%s; all of them are started again in order",
            first.supervisor.name,
            ended[0].said,
            ", ".join(end.client.supervisor.name for end in ended),
            ", ".join(client.supervisor.name for client in left) or "none",
            "; the server reports FAULT" if faulted else "",
        )
        why = f"a fatal fault took its GPU context: {first.supervisor.name} ended first"
        runs = [(client, client.supervisor.process) for client in left]
        for client, _ in runs:
            client.uses = False
            client.supervisor.end_run(why, blameless=True)
        for client, process in runs:
            if process is not None:
                await process.wait()
            while client.supervisor.phase not in (Phase.WAITING, Phase.STOPPED):
                await asyncio.sleep(_STEP_S)

    async def _until_free(self, cleared: frozenset[str], seen: float) -> None:
        """The server takes clients again once the last of the old ones is gone.

        Args:
            cleared: GPUs whose clients were ended.
            seen: when the fault was, of the loop's clock.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while loop.time() < begin + _FREE_S:
            bad = await self._bad()
            if not bad:
                return
            # Who ended elsewhere before that may be the one that the server minds.
            suspects = any(end.at <= seen for end in self._ended)
            if suspects and loop.time() >= begin + self._settle_s:
                return
            await asyncio.sleep(_LOOK_S)
        # What ends on other GPUs meanwhile is not to be laid to this.
        self._lasting |= cleared
        others = {pid: name for server in bad for pid, name in server.clients.items()}
        log.error(
            "the MPS server still reports FAULT; it waits for clients that are not this router's: "
            "%s. End them, or engines that start now run into the same fault",
            ", ".join(f"{pid} ({name})" for pid, name in others.items()) or "none that it names",
        )

    async def _status(self) -> Status:
        try:
            return await asyncio.to_thread(self._make().status)
        except MpsError as error:
            log.warning("MPS does not say how it is: %s", error)
            return Status(directory=Path(), pid=None)


@dataclass(frozen=True)
class _Shared:
    """The fate of one client."""

    guard: MpsGuard
    client: _Client
    gpu: Callable[[], GpuSettings]

    async def environment(self, variables: dict[str, str]) -> dict[str, str]:
        return await self.guard.environment(self.client, self.gpu(), variables)

    async def clear(self) -> None:
        await self.guard.clear(self.client)

    def ended(self, said: str) -> None:
        self.guard.ended(self.client, said)

    async def is_sealed(self) -> bool:
        return await self.guard.is_sealed(self.client)
