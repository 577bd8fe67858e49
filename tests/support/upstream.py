# SPDX-License-Identifier: Apache-2.0
"""An engine that speaks the OpenAI protocol and does as a test says; no model behind it.

In the test's own event loop, or as a process: `python -m tests.support.upstream PORT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Handler = Callable[[Request, dict[str, Any]], Awaitable[Response]]


def event(text: str) -> bytes:
    """One chunk of a streamed completion."""
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass
class Upstream:
    """What an engine was asked, and what it is to do."""

    name: str = "engine"
    dev_mode: bool = True
    asleep: bool = False
    healthy: bool = True
    tokens: int = 3
    together: int = 0
    """After its first token a stream waits until so many run."""
    pause_s: float = 0.0
    """Before each token."""
    padding: int = 0
    """Bytes that each token is longer."""
    gate: asyncio.Event | None = None
    """Holds every answer until it is set."""
    handler: Handler | None = None
    """Answers instead of the usual."""
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    sleeps: int = 0
    wakes: int = 0
    reloads: int = 0
    """Of the weights, after they were dropped."""
    server_info: dict[str, Any] = field(default_factory=lambda: {"kvcached_sleep": True})
    """What SGLang says of how it was started."""
    probes: int = 0
    probing: int = 0
    """Probes it has now."""
    probed_asleep: int = 0
    probe_gate: asyncio.Event | None = None
    """Holds what it says of its health."""
    nonsense: bool = False
    """What it says of its sleep is not to be understood."""
    ask_gate: asyncio.Event | None = None
    """Holds what it says of its sleep; the other two hold that itself."""
    wake_gate: asyncio.Event | None = None
    sleep_gate: asyncio.Event | None = None
    wake_status: int = 200
    sleep_status: int = 200
    running: int = 0
    most_running: int = 0
    slept_while_running: bool = False
    slept_while_probed: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """A stream was stopped before its end."""
    all_here: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> Starlette:
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
        return Starlette(
            routes=[
                *(Route(path, self._answer, methods=["POST"]) for path in paths),
                Route("/health", self._health),
                Route("/sleep", self._sleep, methods=["POST"]),
                Route("/wake_up", self._wake, methods=["POST"]),
                Route("/is_sleeping", self._is_sleeping),
                Route("/collective_rpc", self._reload, methods=["POST"]),
                Route("/model_info", self._model_info),
                Route("/server_info", self._server_info),
                Route("/probes", self._probes),
                Route("/behave", self._behave, methods=["POST"]),
                Route("/release_memory_occupation", self._sleep, methods=["POST"]),
                Route("/resume_memory_occupation", self._wake, methods=["POST"]),
            ]
        )

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield
        finally:
            self.running -= 1

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        self.seen.append((request.url.path, dict(request.headers), body))
        self.started.set()
        data = json.loads(body)
        if self.handler is not None:
            return await self.handler(request, data)
        if data.get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        with self._run():
            try:
                if self.gate is not None:
                    await self._or_gone(request, self.gate)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            choice = {"index": 0, "text": "hello", "finish_reason": "stop"}
            return JSONResponse({"object": "text_completion", "served_by": self.name,
                                 "model": data["model"], "choices": [choice]})  # fmt: skip

    async def _or_gone(self, request: Request, gate: asyncio.Event) -> None:
        waiting = asyncio.ensure_future(gate.wait())
        gone = asyncio.ensure_future(request.receive())
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            self.cancelled.set()
        for task in (waiting, gone):
            task.cancel()

    async def _stream(self) -> AsyncIterator[bytes]:
        with self._run():
            try:
                for index in range(self.tokens):
                    if self.gate is not None:
                        await self.gate.wait()
                    # Also for no time, or a client that went would not be noticed.
                    await asyncio.sleep(self.pause_s)
                    yield event(f"{self.name} {index}{'x' * self.padding}")
                    if self.running >= self.together:
                        self.all_here.set()
                    if self.together:
                        await self.all_here.wait()
                yield DONE
            except (asyncio.CancelledError, GeneratorExit):
                self.cancelled.set()
                raise

    async def _health(self, _: Request) -> Response:
        self.probes += 1
        self.probed_asleep += self.asleep
        self.probing += 1
        if self.probe_gate is not None:
            await self.probe_gate.wait()
        self.probing -= 1
        return Response(status_code=200 if self.healthy else 500)

    async def _sleep(self, request: Request) -> Response:
        if not self.dev_mode:
            return Response(status_code=404)
        self.seen.append((f"{request.url.path}?{request.url.query}", {}, await request.body()))
        self.sleeps += 1
        self.slept_while_running |= self.running > 0
        self.slept_while_probed |= self.probing > 0
        if self.sleep_gate is not None:
            await self.sleep_gate.wait()
        self.asleep = self.sleep_status == 200
        return Response(status_code=self.sleep_status)

    async def _reload(self, request: Request) -> Response:
        self.reloads += json.loads(await request.body())["method"] == "reload_weights"
        return JSONResponse({"results": [None]})

    async def _probes(self, _: Request) -> Response:
        return JSONResponse(self.probes)

    async def _behave(self, request: Request) -> Response:
        """Of one in another process: what it is to do from now on."""
        for name, value in json.loads(await request.body()).items():
            assert hasattr(self, name)
            setattr(self, name, value)
        return Response()

    async def _server_info(self, _: Request) -> Response:
        return JSONResponse(self.server_info)

    async def _model_info(self, _: Request) -> Response:
        return JSONResponse({})

    async def _wake(self, request: Request) -> Response:
        if not self.dev_mode:
            return Response(status_code=404)
        if request.query_params.get("tags") == "weights":
            return Response()
        self.wakes += 1
        if self.wake_gate is not None:
            await self.wake_gate.wait()
        if self.wake_status == 200:
            self.asleep = False
        return Response("out of memory", status_code=self.wake_status)

    async def _is_sleeping(self, _: Request) -> Response:
        if not self.dev_mode:
            return Response(status_code=404)
        if self.ask_gate is not None:
            await self.ask_gate.wait()
        if self.nonsense:
            return Response("[" * 100_000, media_type="application/json")
        return JSONResponse({"is_sleeping": self.asleep})


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Several servers and a test share the process: none of them takes its signals.
        yield


@contextlib.asynccontextmanager
async def serving(app: Any, port: int = 0) -> AsyncIterator[str]:
    """Serves an ASGI application in this event loop; yields its URL."""
    listening = socket.socket(proto=socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, timeout_graceful_shutdown=1
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError("the server did not start")
            await asyncio.sleep(0.001)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def main() -> None:
    """Serves an engine in a process of its own: PORT PAUSE_S [TOKENS [TOGETHER [PADDING]]]."""
    numbers = [float(text) for text in sys.argv[1:]]
    defaults = (0, 0, 1_000_000, 0, 0)
    port, pause_s, tokens, together, padding = [*numbers, *defaults[len(numbers) :]]
    upstream = Upstream(
        tokens=int(tokens), pause_s=pause_s, together=int(together), padding=int(padding)
    )
    where = {"host": "127.0.0.1", "port": int(port)}
    uvicorn.run(upstream.app(), log_level="error", access_log=False, backlog=4096, **where)


if __name__ == "__main__":
    main()
