# SPDX-License-Identifier: Apache-2.0
"""A model and its replicas: who serves the next request, and whether it sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Coroutine, Iterator, Sequence
from typing import Any

from . import tracing
from .balance import least_loaded, prefix_affine
from .engines import EngineError, Unsupported
from .errors import ApiError, unavailable
from .prompt import Prompt
from .replica import Replica
from .settings import ModelSettings
from .states import Busy, State
from .traffic import Traffic

log = logging.getLogger(__name__)


class Model:
    """What clients name as ``model``. All of it runs in one event loop."""

    def __init__(self, settings: ModelSettings, replicas: list[Replica]) -> None:
        self.settings = settings
        self.replicas = replicas
        self.traffic = Traffic()
        self.created = int(time.time())
        self.pending = 0
        """Requests that have come and are not answered."""
        self.waiting = 0
        """Those of them that wait for the model or for a GPU."""
        self.slept_at: float | None = None
        """Since when it sleeps, in seconds of the wall clock."""
        self.slept_by_hand = False
        self.problem = ""
        """Why it last failed to wake."""
        self.wakes = 0
        self.sleeps = 0
        self.failed_wakes = 0
        self.last_wake_s = 0.0
        self._state = State.ACTIVE
        self._transition: asyncio.Task[None] | None = None
        self._asleep_since = 0.0
        self._retry_at = 0.0
        self._hurry = asyncio.Event()
        self._turn = 0
        self._ask_s = settings.sleep.timeout
        self._changed = asyncio.Event()

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def state(self) -> State:
        if self._state is not State.ACTIVE or any(r.available for r in self.replicas):
            return self._state
        return State.STARTING if any(r.coming for r in self.replicas) else State.FAILED

    @property
    def obstacle(self) -> str:
        """What keeps a request from being served, to be continued with "within 5 s"."""
        if self.state is State.STARTING:
            problem = next((r.problem for r in self.replicas if r.coming and r.problem), "")
            return f"no engine of {self.name} was ready ({problem})"
        if self.state is State.WAKING:
            return f"{self.name} did not wake"
        return f"{self.name} had no room"

    def note_change(self) -> None:
        """A replica came or went: whoever waits for one looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    # -- requests ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Keeps the model from falling asleep while the block lasts."""
        self.pending += 1
        self.traffic.began()
        try:
            yield
        finally:
            self.pending -= 1
            self.traffic.ended()

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Counts a request that waits.

        Raises:
            ApiError: too many wait already (status 503).
        """
        limit = self.settings.queue.max_waiting
        if self.waiting >= limit and not self._serves_at_once():
            raise unavailable(
                f"{limit} requests wait for {self.name} already: ask again later",
                "queue_full",
                self.settings.queue.timeout / 4,
            )
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def _serves_at_once(self) -> bool:
        return self._state is State.ACTIVE and any(
            replica.available and replica.gate.has_room for replica in self.replicas
        )

    async def ready(self, *, patient: bool = True) -> None:
        """Return when it is active, having woken it if need be: once, for all who wait.

        Args:
            patient: also wait while engines crash and are started again.

        Raises:
            ApiError: it failed to wake (status 503).
        """
        before = {replica: replica.crashes for replica in self.replicas}
        while True:
            state = self.state
            if state is State.STARTING:
                coming = [replica for replica in self.replicas if replica.coming]
                if not patient and all(r.crashes > before.get(r, 0) for r in coming):
                    raise unavailable(
                        f"{self.obstacle}; it is started again by itself", "not_started", 5
                    )
                await self._changed.wait()
                continue
            if self._state is State.ACTIVE and not self._sleeps_on:
                return
            if self._state is State.FAILED and time.monotonic() < self._retry_at:
                raise self._not_woken()
            if self._state in (State.ASLEEP, State.FAILED, State.ACTIVE):
                self._begin(State.WAKING, self._wake())
            await self.settled()
            if self._state is State.FAILED:
                raise self._not_woken()

    @property
    def prefix_bytes(self) -> int:
        """How much of a prompt's beginning it is told for its choice of a replica."""
        return self.settings.prefix_bytes if self.settings.routing == "prefix" else 0

    @property
    def _sleeps_on(self) -> bool:
        """Whether it is active, but what is left of its replicas sleeps, or was never asked."""
        if any(replica.available for replica in self.replicas):
            return False
        return any((r.healthy or r.down) and not r.awake for r in self.replicas)

    def choose(self, prompt: Prompt, tried: Collection[Replica] = ()) -> Replica:
        """The replica for a request, one that was not tried yet if there is any.

        Raises:
            ApiError: none is healthy (status 503).
        """
        available = [replica for replica in self.replicas if replica.available]
        choices = [replica for replica in available if replica not in tried] or available
        if not choices:
            problem = next((r.problem for r in self.replicas if r.problem), "it does not answer")
            raise unavailable(f"no engine of {self.name} is healthy: {problem}", "unhealthy", 5)
        if self.settings.routing == "prefix":
            return prefix_affine(choices, prompt.prefix(self.settings.prefix_bytes))
        self._turn += 1
        return least_loaded(choices, self._turn)

    @property
    def rests(self) -> bool:
        """Whether it sleeps or is about to."""
        return self._state in (State.ASLEEP, State.SLEEPING)

    # -- sleep ------------------------------------------------------------------------------------

    @property
    def sleeps_when_idle(self) -> bool:
        """Whether it is due to be put to sleep."""
        after = self.settings.sleep.after
        return after is not None and self.state is State.ACTIVE and self.traffic.idle_s >= after

    @property
    def yields(self) -> bool:
        """Whether it would sleep to make room for another."""
        sleep = self.settings.sleep
        idle = self.state is State.ACTIVE and not self.pending
        return sleep.after is not None and idle and self.traffic.idle_s >= sleep.yields_after

    async def sleep(self, *, by_hand: bool) -> None:
        """Put it to sleep, or see it to the end of falling asleep.

        Raises:
            Busy: it has requests, is being woken, or its engines refused.
        """
        if self._state is State.WAKING:
            raise Busy(f"{self.name} is being woken: try again when it is active")
        if self._state is not State.SLEEPING and self._state is not State.ASLEEP:
            if self.pending:
                raise Busy(f"{self.name} has {self.pending} requests: try again when it is idle")
            self.slept_by_hand = by_hand
            self._begin(State.SLEEPING, self._sleep())
        await self.settled()
        if self._state is not State.ASLEEP and self.problem:
            raise Busy(f"{self.name} stays awake: {self.problem}")

    async def wake(self) -> None:
        """Wake it without regard to its minimum of sleep.

        Raises:
            ApiError: it failed to, or its engines crashed as they started (status 503).
        """
        self._hurry.set()
        self._retry_at = 0.0
        try:
            await self.ready(patient=False)
        finally:
            self._hurry.clear()

    def learn(self, timeout: float) -> None:
        """Begin to ask the engines whether they sleep, which requests wait for.

        Args:
            timeout: seconds for an engine to answer; one that does not is taken to be awake.
        """

        self._ask_s = timeout

        async def one(replica: Replica) -> None:
            async with replica.changing:
                await self._ask(replica)

        async def ask() -> None:
            await asyncio.gather(*map(one, self.replicas))
            if all(replica.asleep for replica in self.replicas):
                self._fell_asleep()
            else:
                self._state = State.ACTIVE

        self._begin(State.WAKING, ask())

    async def settled(self) -> None:
        """Wait for the end of what it is about to become."""
        # Shielded: a client that goes away does not take the others' wake with it.
        if self._transition is not None:
            await asyncio.shield(self._transition)

    def abandon(self) -> list[asyncio.Task[None]]:
        """What it is about to become, for the router to cancel as it ends."""
        return [] if self._transition is None else [self._transition]

    def joined(self, replicas: list[Replica]) -> None:
        """Note replicas that it did not have before: nobody has asked yet whether they sleep."""
        for replica in replicas:
            replica.asleep = None

    async def mend(self, replica: Replica) -> None:
        """Wake a replica that sleeps although the model is active.

        Raises:
            EngineError: it does not wake.
        """
        there = replica.healthy or replica.down
        if self._state is not State.ACTIVE or not there or replica.awake:
            return
        async with replica.changing:
            if self._state is State.ACTIVE:
                await self._wake_one(replica)

    async def _ask(self, replica: Replica) -> None:
        told = await replica.engine.is_asleep(self._ask_s)
        if told is not None:
            replica.asleep = told
        elif not replica.changed:
            # It was started awake, and nobody but the router puts it to sleep.
            replica.asleep = False

    def _begin(self, state: State, work: Coroutine[Any, Any, None]) -> None:
        # Nothing is awaited between a look at the state and this, so there is only ever one.
        log.info("%s: %s", self.name, state.value)
        self._state = state
        task = asyncio.create_task(self._carry_out(work), name=f"{self.name}: {state.value}")
        self._transition = task

    async def _carry_out(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            # Or it would be on the way for ever, and whoever asks for it with it.
            log.exception("%s: %s failed in an unforeseen way", self.name, self._state.value)
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, problem: str) -> None:
        self._state = State.FAILED
        self.problem = problem
        self._retry_at = time.monotonic() + self.settings.sleep.retry
        log.warning("%s did not wake: %s", self.name, problem)

    def _not_woken(self) -> ApiError:
        left = self._retry_at - time.monotonic()
        return unavailable(f"{self.name} did not wake: {self.problem}", "wake_failed", left)

    def _fell_asleep(self) -> None:
        self._state = State.ASLEEP
        self.slept_at = time.time()
        self._asleep_since = time.monotonic()

    async def _sleep(self) -> None:
        awake = [replica for replica in self.replicas if replica.asleep is not True]
        self.problem = ""

        async def one(replica: Replica) -> None:
            settings = self.settings.sleep
            async with replica.changing:
                replica.asleep = None
                replica.changed = True
                replica.level = settings.level
                try:
                    await replica.engine.sleep(settings.level, settings.timeout)
                except Unsupported:
                    replica.asleep = False
                    raise
                replica.asleep = True

        problem = _first_problem(
            await asyncio.gather(*(one(replica) for replica in awake), return_exceptions=True)
        )
        if problem is None:
            self.sleeps += 1
            self._fell_asleep()
            return
        log.warning("%s does not sleep: %s", self.name, problem)
        # Asked again only after another time of idleness.
        self.traffic.touch()
        await self._wake_all()
        self.problem = problem

    async def _wake(self) -> None:
        left = self._asleep_since + self.settings.sleep.minimum - time.monotonic()
        if self.slept_at is not None and left > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), left)
        begin = time.monotonic()
        with tracing.step("wake", model=self.name):
            woken = await self._wake_all()
        if self._state is State.FAILED:
            self.failed_wakes += 1
        elif woken:
            self.wakes += 1
            self.last_wake_s = time.monotonic() - begin
            self.traffic.touch()

    async def _wake_all(self) -> bool:
        """Wake the replicas that sleep; whether there were any that did so."""
        asleep = [replica for replica in self.replicas if not replica.awake]

        async def one(replica: Replica) -> bool:
            async with replica.changing:
                return await self._wake_one(replica)

        results = await asyncio.gather(*map(one, asleep), return_exceptions=True)
        # One that is awake but does not answer is no help: then the wake of the others counts.
        if any(r.available for r in self.replicas) or all(r.awake for r in self.replicas):
            self._state = State.ACTIVE
            self.slept_at = None
            self.problem = ""
        else:
            self._fail(_first_problem(results) or "its replicas have just been replaced")
        return any(result is True for result in results)

    async def _wake_one(self, replica: Replica) -> bool:
        """See to it that a replica is awake; whether it slept."""
        if replica.asleep is None:
            await self._ask(replica)
        slept = not replica.awake
        if slept:
            level = replica.level or self.settings.sleep.level
            await replica.engine.wake(level, self.settings.sleep.timeout)
            replica.asleep = False
        # Others of the model may be starting, and whoever waits for those needs not any more.
        self.note_change()
        return slept


def _first_problem(results: Sequence[object]) -> str | None:
    for result in results:
        if isinstance(result, EngineError):
            return str(result)
        if isinstance(result, Exception):
            log.error("an engine failed in an unforeseen way", exc_info=result)
            return f"{type(result).__name__}: {result}"
    return None
