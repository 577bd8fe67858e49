# SPDX-License-Identifier: Apache-2.0
"""Keeps one engine running while it is wanted: starts it, watches it, starts it again, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from ..engines import EngineError
from ..settings import LaunchSettings
from .backoff import Backoff
from .command import Recipe
from .process import EngineProcess
from .turns import Turn

log = logging.getLogger(__name__)
_LOOK_S = 0.25
_PROBE_S = 5.0


class Phase(str, Enum):
    """Of an engine's process."""

    STOPPED = "stopped"
    """Nobody wants it to run."""
    WAITING = "waiting"
    """For its turn, or until it is started again."""
    STARTING = "starting"
    """It runs and is not ready yet."""
    READY = "ready"
    STOPPING = "stopping"


class Fate(Protocol):
    """What an engine shares with others beside memory."""

    async def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """What to add to its environment, which is ``variables``.

        Raises:
            EngineError: it cannot be started as configured.
        """

    async def clear(self) -> None:
        """Wait until it may start."""

    def ended(self, said: str) -> None:
        """Note that it ended, unasked."""

    async def is_sealed(self) -> bool:
        """Whether what it shares is broken, and with it the process, if that still runs."""


class Alone:
    """Shares nothing."""

    async def environment(self, variables: dict[str, str]) -> dict[str, str]:
        return {}

    async def clear(self) -> None:
        pass

    def ended(self, said: str) -> None:
        pass

    async def is_sealed(self) -> bool:
        return False


@dataclass
class Place:
    """What an engine needs to itself while it starts or runs."""

    port: asyncio.Lock
    """Held by who listens on its port: the one before must have ended."""
    turn: Turn
    """Held while it starts, and until it is gone if it does not."""


@dataclass
class Hooks:
    """What a supervisor asks and tells."""

    make: Callable[[], Recipe]
    """Command and environment of the next start."""
    probe: Callable[[float], Awaitable[None]]
    """Raises EngineError unless the engine answers within so many seconds; while it starts."""
    look: Callable[[float], Awaitable[None]]
    """The same once it is ready, within so many seconds at most: also says if it may serve."""
    pause: Callable[[float], Awaitable[None]]
    """Until the next look, so many seconds at most."""
    restart: Callable[[], bool]
    """Whether to start it again after it ended by itself."""
    changed: Callable[[], None]
    """Its phase changed."""


@dataclass(eq=False)
class Supervisor:
    """One engine. All of it runs in one event loop."""

    name: str
    settings: LaunchSettings
    place: Place
    hooks: Hooks
    fate: Fate = field(default_factory=Alone)
    phase: Phase = Phase.STOPPED
    problem: str = "it is not started"
    """Why it is not ready."""
    starts: int = 0
    crashes: int = 0
    last_end: str = ""
    """How the run before ended, if that was unasked."""
    process: EngineProcess | None = None
    _asked: bool = False
    """Somebody wants it to run; the run before that may still be on its way out."""
    _wanted: bool = False
    """Of the run that there is now."""
    _blameless: bool = False
    _anew: bool = False
    """The next run begins whatever :attr:`Hooks.restart` says."""
    _task: asyncio.Task[None] | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _broken: asyncio.Event = field(default_factory=asyncio.Event)
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever an attempt to start it came to its end, good or bad."""

    def __post_init__(self) -> None:
        self._backoff = Backoff(self.settings.restart)

    @property
    def wanted(self) -> bool:
        """Whether it runs or is about to."""
        return self._asked

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    def start(self) -> None:
        """See to it that it runs, if need be after it has ended; returns at once."""
        if self._asked:
            return
        self._asked = True
        self._settled.clear()
        before = self._task
        self._task = asyncio.create_task(self._run(before), name=f"engine {self.name}")

    async def started(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            EngineError: the first attempt failed; it is stopped then.
        """
        self.start()
        while not self.ready:
            self._settled.clear()
            crashes = self.crashes
            await self._settled.wait()
            if self.ready:
                return
            if self.crashes > crashes or not self._asked:
                problem = self.last_end
                await self.stop(f"it did not start: {problem}")
                raise EngineError(f"{self.name} did not start: {problem}")

    async def stop(self, why: str = "it is stopped") -> None:
        """End it, and return when all of it has ended."""
        self._asked = False
        if self._wanted:
            self._wanted = False
            self._stop.set()
            self._set(Phase.STOPPING, why)
        if self._task is not None:
            # Shielded: who asked may go away, the engine must end nevertheless.
            await asyncio.shield(self._task)

    def end_run(self, why: str, *, blameless: bool = False) -> None:
        """Have this run ended as if by itself, and another one started.

        Args:
            why: what is said of it.
            blameless: the fault was another's, and the next start need not wait.
        """
        self.problem = why
        self._blameless = blameless
        self._broken.set()

    async def start_anew(self, why: str) -> None:
        """Have this run ended as if by itself, and wait until another one is ready.

        Raises:
            EngineError: its first attempt failed and it is stopped, or somebody stopped it.
        """
        if self.ready:
            before = self.crashes
            self._anew = True
            self.end_run(why)
            while self.crashes == before and self._asked:
                self._settled.clear()
                await self._settled.wait()
            if not self._asked:
                raise EngineError(f"{self.name} is not started anew: {self.problem}")
        await self.started()

    # -- the life of one ---------------------------------------------------------------------------

    async def _run(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        if not self._asked:
            self._settled.set()
            return
        self._wanted = True
        self._anew = False
        self._stop.clear()
        try:
            self._set(Phase.WAITING, "it waits for its port")
            async with _held(self.place.port, self._stop):
                while self._wanted:
                    await self._pause()
                    await self._first(self.fate.clear())
                    if self._wanted:
                        await self._one_run()
        except Exception:
            log.exception("engine %s: its supervisor failed", self.name)
            self.problem = "its supervisor failed: the log says how"
        finally:
            self._wanted = False
            if self._task is asyncio.current_task():
                self._asked = False
            self._set(Phase.STOPPED, self.problem)
            self._settled.set()

    async def _pause(self) -> None:
        delay = self._backoff.delay_s
        if delay:
            self._set(Phase.WAITING, f"it is started again after {delay:g} s: {self.last_end}")
            await self._first(asyncio.sleep(delay))

    async def _one_run(self) -> None:
        since: float | None = None
        process: EngineProcess | None = None
        try:
            async with _held(self.place.turn, self._stop):
                # Who had the turn before may have come to an end that concerns others.
                await self._first(self.fate.clear())
                if not self._wanted:
                    return
                again = f"it is starting again: {self.last_end}"
                self._set(Phase.STARTING, again if self.last_end else "it is starting")
                self._broken.clear()
                process = await self._launch()
                if await self._becomes_ready(process):
                    since = time.monotonic()
                    self.last_end = ""
                    self._set(Phase.READY, "")
                    self._settled.set()
                else:
                    # The memory it has taken is missing to the next one until then.
                    said = await self._end(process)
            if since is not None:
                await self._watch(process)
                said = await self._end(process)
        except (EngineError, OSError) as error:
            said = str(error)
        except Exception as error:
            log.exception("engine %s: this was not foreseen", self.name)
            said = f"{type(error).__name__}: {error}"
        if process is not None and process.runs:
            await process.stop(self.settings.stop_time)
        if not self._wanted:
            return
        self.crashes += 1
        self.problem = self.last_end = said
        if not self._blameless:
            self._backoff.failed(0.0 if since is None else time.monotonic() - since)
        self._blameless = False
        log.error("engine %s: %s", self.name, said)
        self._wanted = self._anew or self.hooks.restart()
        self._anew = False
        if self._wanted:
            self._set(Phase.WAITING, said)
        self._settled.set()
        self.fate.ended(said)

    async def _launch(self) -> EngineProcess:
        _require_free(self.settings.port)
        command, env = self.hooks.make()
        # The engine's own settings win, as whoever wrote them will have had a reason.
        env = await self.fate.environment(env) | env
        settings = self.settings
        process = await EngineProcess.start(command, env, settings.folder, settings.log)
        self.process = process
        self.starts += 1
        log.info("engine %s: process %d: %s", self.name, process.pid, " ".join(command)[:500])
        return process

    async def _becomes_ready(self, process: EngineProcess) -> bool:
        end = time.monotonic() + self.settings.start_time
        while process.runs and self._wanted and not self._broken.is_set():
            if time.monotonic() > end:
                self.problem = f"it was not ready within {self.settings.start_time:g} s"
                self._broken.set()
                break
            with contextlib.suppress(EngineError):
                await self._first_of(process, self.hooks.probe(_PROBE_S))
                return process.runs and self._wanted and not self._broken.is_set()
            await self._first(process.wait(), _LOOK_S)
        return False

    async def _watch(self, process: EngineProcess) -> None:
        """Return when it ended, hangs, or shall end."""
        well = time.monotonic()
        while process.runs and self._wanted and not self._broken.is_set():
            await self._first_of(process, self.hooks.pause(self.settings.hang_time / 4))
            try:
                await self._first_of(process, self.hooks.look(self.settings.hang_time))
                well = time.monotonic()
            except EngineError as error:
                if time.monotonic() - well >= self.settings.hang_time:
                    self.end_run(f"it was not healthy for {self.settings.hang_time:g} s: {error}")
                    return

    async def _end(self, process: EngineProcess) -> str:
        """What its end is reported as."""
        if process.runs:
            asked = self._broken.is_set() and self._wanted
            said = self.problem
            self._set(Phase.STOPPING, said)
            await process.stop(self.settings.stop_time)
            if asked:
                return said
        code = await process.wait()
        words = process.last_words()
        how = f"ended with signal {-code}" if code < 0 else f"ended with status {code}"
        return f"process {process.pid} {how}" + (f": {words}" if words else "")

    # -- waiting -----------------------------------------------------------------------------------

    async def _first_of(self, process: EngineProcess, work: Awaitable[None]) -> None:
        await self._first(work, None, process.wait(), self._broken.wait())

    async def _first(
        self, work: Awaitable[object], timeout: float | None = None, *others: Awaitable[object]
    ) -> None:
        """Wait for ``work``, and no longer than until it is to be stopped, or one of ``others``."""
        main = asyncio.ensure_future(work)
        tasks = [main, *map(asyncio.ensure_future, (self._stop.wait(), *others))]
        try:
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                if not task.done():
                    task.cancel()
            await asyncio.wait(tasks)
        if not main.cancelled():
            main.result()

    def _set(self, phase: Phase, problem: str) -> None:
        self.problem = problem
        if phase is not self.phase:
            self.phase = phase
            self.hooks.changed()


def _require_free(port: int) -> None:
    """Or what answers there would be taken for the engine.

    Raises:
        EngineError: somebody listens on it.
    """
    with socket.socket() as probe:
        # As servers do, since connections of the one before may linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise EngineError(
                f"port {port} cannot be listened on ({error.strerror}): end what uses it, or name "
                "another 'port'"
            ) from None


@contextlib.asynccontextmanager
async def _held(lock: asyncio.Lock | Turn, stop: asyncio.Event) -> AsyncIterator[None]:
    """Hold ``lock`` for the block, which begins without it if ``stop`` is set before."""
    acquire: asyncio.Future[object] = asyncio.ensure_future(lock.acquire())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((acquire, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        if not acquire.done():
            acquire.cancel()
        await asyncio.wait((acquire, stopped))
    has = not acquire.cancelled()
    try:
        yield
    finally:
        if has:
            lock.release()
