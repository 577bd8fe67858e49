# SPDX-License-Identifier: Apache-2.0
"""The queue in front of a GPU: so many requests run, the others wait for their turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from .deadlines import next_job
from .settings import GpuSettings

_NEWEST = 0.2
"""Weight of the newest measurement among those of how long requests run."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request's place in a queue; times are of the monotonic clock."""

    arrived: float
    objective: float
    """When its first token should be out."""
    first_s: float
    """Seconds until that once it runs."""
    kind: str = ""
    """Requests of one kind take about the same time."""
    due: float = field(init=False, default=0.0)
    """When the queue should have done with it."""
    work: float = field(init=False, default=0.0)
    """Seconds for which it keeps the queue from going on."""
    turn: asyncio.Future[None] = field(init=False)


class Gate:
    """Lets ``max_running`` requests through at a time, the most urgent first."""

    def __init__(self, name: str, settings: GpuSettings) -> None:
        self.name = name
        self.running = 0
        self._settings = settings
        self._waiting: list[Ticket] = []
        self._runs: dict[str, float] = {}
        """Seconds that requests of a kind ran lately."""

    @property
    def settings(self) -> GpuSettings:
        return self._settings

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.running or self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether a request would be let through at once."""
        return not self._waiting and self.running < self._settings.max_running

    def configure(self, settings: GpuSettings) -> None:
        """Take other settings; who runs goes on, also if they are more than now allowed."""
        self._settings = settings
        self._admit()

    async def enter(self, ticket: Ticket) -> None:
        """Wait for a turn. Who has had one must leave.

        Cancelled, it gives up its place, or the turn that it was just given.
        """
        ticket.turn = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        self._admit()
        try:
            await ticket.turn
        except BaseException:
            if ticket.turn.cancelled():
                self._waiting.remove(ticket)
            else:
                self.leave()
            raise

    def leave(self) -> None:
        """Make room for the next."""
        self.running -= 1
        self._admit()

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for a turn, and hold it for the block."""
        await self.enter(ticket)
        began = time.monotonic()
        try:
            yield
        finally:
            self._learn(ticket.kind, time.monotonic() - began)
            self.leave()

    def _learn(self, kind: str, ran: float) -> None:
        before = self._runs.get(kind, ran)
        self._runs[kind] = before + _NEWEST * (ran - before)

    def _plan(self, ticket: Ticket) -> None:
        """Tell when the queue must have done with a request for its first token to be in time.

        A place is free again when its request has been answered in full, and there are several: so
        a request holds the queue up by what it runs, divided by the places. The first token is out
        earlier, or later, than that, by which the time it is due moves.
        """
        runs = self._runs.get(ticket.kind, ticket.first_s)
        ticket.work = runs / self._settings.max_running
        ticket.due = ticket.objective - ticket.first_s + ticket.work

    def _admit(self) -> None:
        while self.running < self._settings.max_running:
            # Those whose request was cancelled this moment have not left the queue yet.
            waiting = [ticket for ticket in self._waiting if not ticket.turn.done()]
            for each in waiting:
                self._plan(each)
            ticket = next_job(waiting, time.monotonic(), self._settings.order)
            if ticket is None:
                return
            self._waiting.remove(ticket)
            self.running += 1
            ticket.turn.set_result(None)
