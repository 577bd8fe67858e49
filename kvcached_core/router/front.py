# SPDX-License-Identifier: Apache-2.0
"""The endpoints that engines answer: reads a request, passes the answer on byte for byte."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
from opentelemetry.trace import Span
from starlette.types import Message, Receive, Scope, Send

from . import headers, tracing
from .answer import Answer, Broken, Call, answer
from .body import Disconnected, read_body
from .errors import ApiError
from .model import Model
from .prompt import Prompt, parse
from .router import Router

log = logging.getLogger(__name__)
_EVENTS = b"text/event-stream"
UNKNOWN = "-"
"""The label of requests that name no model there is."""


@dataclass(slots=True)
class _Downstream:
    """What one client was sent."""

    send: Send
    stall_s: float
    status: int = 0
    complete: bool = False
    tail: bytes = b""
    began: float = 0.0
    notes: list[str] = field(default_factory=list)

    async def start(self, status: int, raw: headers.RawHeaders) -> None:
        self.status = status
        self.began = time.monotonic()
        await self._put({"type": "http.response.start", "status": status, "headers": raw})

    async def body(self, chunk: bytes, *, more: bool) -> None:
        self.tail = (self.tail + chunk)[-4:]
        await self._put({"type": "http.response.body", "body": chunk, "more_body": more})
        self.complete = not more

    async def _put(self, message: Message) -> None:
        # The server takes bytes while its buffer has room: a client that does not read stops us
        # here, and with us the engine's answer, but not forever.
        try:
            with anyio.fail_after(self.stall_s):
                await self.send(message)
        except TimeoutError:
            raise Disconnected from None


class Forward:
    """An ASGI endpoint that has a request answered by an engine at the same path."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        identity = scope["state"]["request_id"]
        with tracing.request(scope["path"], scope["headers"], identity) as span:
            out = await self._answer(scope, receive, send, span)
            tracing.answered(span, out.status, complete=out.complete)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, span: Span) -> _Downstream:
        settings = self._router.settings
        arrived = time.monotonic()
        out = _Downstream(send, settings.limits.stall_time)
        label = UNKNOWN
        gone = False
        try:
            with self._router.bodies.share() as share:
                parsed = parse(await read_body(scope, receive, settings.limits, share))
                model = self._router.model(parsed.model)
                prompt = parsed.reduced(model.prefix_bytes)
                del parsed
                label = model.name
                span.set_attribute("gen_ai.request.model", label)
                await self._while_connected(
                    receive, lambda: self._serve(scope, model, prompt, out, arrived)
                )
        except ApiError as error:
            gone = not await _refuse(out, error)
        except Disconnected:
            gone = not out.complete
        metrics = self._router.metrics
        if gone:
            metrics.aborted.labels(label).inc()
        else:
            metrics.requests.labels(label, str(out.status)).inc()
            metrics.duration.labels(label).observe(time.monotonic() - arrived)
        return out

    async def _while_connected(
        self, receive: Receive, serve: Callable[[], Awaitable[None]]
    ) -> None:
        """Run ``serve`` until it ends or the client has gone, which cancels it.

        Raises:
            ApiError: of ``serve``.
            Disconnected: the client went, or reads nothing.
        """
        failure: ApiError | Disconnected | None = None
        finished = False

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                await serve()
                finished = True
            except (ApiError, Disconnected) as error:
                failure = error
                finished = True
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not finished:
            raise Disconnected

    async def _serve(
        self, scope: Scope, model: Model, prompt: Prompt, out: _Downstream, arrived: float
    ) -> None:
        settings = self._router.settings
        limit = settings.limits.request_time
        raw = headers.to_engine(scope["headers"], scope["state"]["request_id"])
        call = Call(scope["path"], raw, prompt, arrived)
        with model.request():
            try:
                with anyio.fail_after(limit):
                    async with answer(model, call, settings, self._router.metrics) as found:
                        await self._pass_on(model, found, out, arrived)
            except TimeoutError:
                if not out.status:
                    raise ApiError(
                        504,
                        f"{model.name} did not answer within {limit:g} s: ask for less",
                        "timeout",
                        "request_timeout",
                    ) from None
                log.warning("%s: an answer took more than %g s and was cut", model.name, limit)
            finally:
                good = out.complete and out.status < 400
                model.traffic.answered(good, time.monotonic() - arrived)

    async def _pass_on(self, model: Model, found: Answer, out: _Downstream, arrived: float) -> None:
        metrics = self._router.metrics
        raw = headers.to_client(found.response.raw_headers)
        await out.start(found.response.status, raw)
        took = out.began - arrived
        metrics.first_byte.labels(model.name).observe(took)
        if model.settings.ttft is not None and took > model.settings.ttft:
            metrics.missed.labels(model.name).inc()
        try:
            async for chunk in found.chunks(self._router.settings.limits.stall_time):
                await out.body(chunk, more=True)
            await out.body(b"", more=False)
        except Broken as error:
            # The answer is left unfinished, so that nobody takes it for a whole one.
            metrics.broken.labels(model.name).inc()
            log.warning("%s: %s: %s", model.name, found.replica.name, error)
            found.replica.failed(str(error), self._router.settings.health)
            kind = found.response.headers.get("content-type", "").encode()
            if kind.startswith(_EVENTS) and out.tail.endswith(b"\n\n"):
                failure = ApiError(
                    502,
                    f"the engine of {model.name} ended in the middle of its answer: ask again",
                    "bad_gateway",
                    "engine_failed",
                )
                await out.body(b"data: " + failure.body + b"\n\n", more=True)


async def _refuse(out: _Downstream, error: ApiError) -> bool:
    """Answer with an error unless an answer has begun; whether the client is still there."""
    if out.status:
        return True
    length = (b"content-length", b"%d" % len(error.body))
    try:
        await out.start(error.status, [*error.headers, length])
        await out.body(error.body, more=False)
    except Disconnected:
        return False
    return True
