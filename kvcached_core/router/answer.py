# SPDX-License-Identifier: Apache-2.0
"""Gets a request answered by one of a model's replicas, trying another while nothing was sent."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import anyio
import anyio.lowlevel
from opentelemetry.trace import SpanKind

from . import headers, tracing
from .errors import ApiError, unavailable
from .gate import Ticket
from .headers import RawHeaders
from .metrics import Metrics
from .model import Model
from .prompt import Prompt
from .replica import Replica
from .settings import RouterSettings

log = logging.getLogger(__name__)
# The engine or what is before it says that it cannot serve now; another one might.
_TRY_ANOTHER = frozenset((502, 503, 504))
_NOT_REACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_MOST_BROKEN = 2
"""Engines that may break down over one request."""
_PIECE = 64 << 10
"""Most bytes passed on at once: a client that does not read has two of them, beside what lies in
the engine's connection."""


class Broken(Exception):
    """An engine ended in the middle of its answer; part of it may have been passed on."""


@dataclass(slots=True)
class Call:
    """A request that was read and is to be answered."""

    path: str
    headers: RawHeaders
    prompt: Prompt
    arrived: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    """Seconds that its attempts have been in the queue."""


@dataclass(slots=True)
class Answer:
    """An answer of which the first bytes are there."""

    replica: Replica
    response: aiohttp.ClientResponse
    first: bytes

    async def chunks(self, stall_s: float) -> AsyncIterator[bytes]:
        """The body as it came.

        Raises:
            Broken: the engine ended before the answer did, or paused for longer than ``stall_s``.
        """
        chunk = self.first
        while chunk:
            yield chunk
            # Others have their turn, also while all that is sent here is there and taken at once.
            await anyio.lowlevel.checkpoint()
            try:
                with anyio.fail_after(stall_s):
                    # What has come meanwhile: a slow moment makes larger pieces, not a queue.
                    chunk = await self.response.content.read(_PIECE)
            except aiohttp.ClientError as error:
                raise Broken(_reason(error)) from None
            except TimeoutError:
                raise Broken(f"the engine sent nothing for {stall_s:g} s") from None


@contextlib.asynccontextmanager
async def answer(
    model: Model, call: Call, settings: RouterSettings, metrics: Metrics
) -> AsyncIterator[Answer]:
    """The answer of a replica, which is freed with the end of the block, complete or not.

    Raises:
        ApiError: 503 if no replica can serve now, 502 if those that were tried broke down.
    """
    tried: list[Replica] = []
    attempts = 1 + model.settings.retries
    broke = 0
    for attempt in range(1, attempts + 1):
        async with contextlib.AsyncExitStack() as stack:
            with tracing.step("queue", model=model.name) as span:
                replica = await _turn(stack, model, call, tried, metrics)
                span.set_attribute("kvcached.replica", replica.name)
            tried.append(replica)
            try:
                stack.enter_context(
                    tracing.step("engine", SpanKind.CLIENT, replica=replica.name, attempt=attempt)
                )
                found = await _ask(stack, replica, call)
            except aiohttp.ClientError as error:
                reason = _reason(error)
                certain = isinstance(error, _NOT_REACHED)
                replica.failed(reason, settings.health, certain=certain)
                broke += not certain
                # It may be what the request asks for that ends engines: not one after another.
                if attempt == attempts or broke == _MOST_BROKEN:
                    raise _gave_up(model, reason) from None
            else:
                status = found.response.status
                others = [r for r in model.replicas if r.available and r not in tried]
                if attempt == attempts or status not in _TRY_ANOTHER or not others:
                    if status not in _TRY_ANOTHER:
                        replica.succeeded()
                    yield found
                    return
                reason = f"status {status}"
        metrics.retries.labels(model.name).inc()
        log.warning("%s: %s: %s; trying again", model.name, replica.name, reason)


async def _turn(
    stack: contextlib.AsyncExitStack,
    model: Model,
    call: Call,
    tried: list[Replica],
    metrics: Metrics,
) -> Replica:
    """Wait until the model is awake and a replica has room, both of which the stack gives up."""
    settings = model.settings
    began = time.monotonic()
    due = call.arrived + (settings.ttft or settings.queue.timeout)
    work = call.prompt.tokens / settings.prefill_rate
    with model.queued():
        try:
            # What engines that broke down have taken is no time in the queue.
            with anyio.fail_after(settings.queue.timeout - call.waited):
                await model.ready()
                replica = model.choose(call.prompt, tried)
                stack.enter_context(replica.loaded())
                ticket = Ticket(call.arrived, due, work, model.name)
                await stack.enter_async_context(replica.gate.turn(ticket))
        except TimeoutError:
            raise unavailable(
                f"{model.obstacle} within {settings.queue.timeout:g} s: ask again later",
                "queue_timeout",
                settings.queue.timeout / 4,
            ) from None
    waited = time.monotonic() - began
    call.waited += waited
    metrics.queue_time.labels(model.name).observe(waited)
    return replica


async def _ask(stack: contextlib.AsyncExitStack, replica: Replica, call: Call) -> Answer:
    """Send it, and wait for the first bytes of the answer's body."""
    raw = tracing.onward(call.headers)
    response = await replica.send(call.path, headers.as_text(raw), call.prompt.body)
    # Also when the request is cancelled: an answer that was not read to its end ends the
    # connection, which tells the engine to stop.
    stack.callback(response.close)
    return Answer(replica, response, await response.content.read(_PIECE))


def _reason(error: aiohttp.ClientError) -> str:
    return str(error) or type(error).__name__


def _gave_up(model: Model, reason: str) -> ApiError:
    return ApiError(
        502, f"the engine of {model.name} did not answer: {reason}", "bad_gateway", "engine_failed"
    )
