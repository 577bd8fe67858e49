# SPDX-License-Identifier: Apache-2.0
"""Runs the router as a process: its port, its signals, its log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn

from ..config import ConfigError
from . import tracing
from .app import make_app
from .loading import Loaded
from .router import Router

log = logging.getLogger(__name__)


def serve(loaded: Loaded) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is in flight. SIGHUP reads the file again.

    Raises:
        OSError: the address cannot be listened on.
        ConfigError: traces are wanted and cannot be exported.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # It logs each request to an engine otherwise.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _allow_many_files()
    listen = loaded.settings.listen
    end_traces = tracing.configure(os.environ)
    try:
        with _bind(listen.address, listen.port) as listening:
            asyncio.run(_run(loaded, listening))
    finally:
        if end_traces is not None:
            end_traces()


async def _run(loaded: Loaded, listening: socket.socket) -> None:
    router = Router(loaded)

    def reload() -> None:
        try:
            router.reload()
        except ConfigError as error:
            log.error("the configuration stays as it was:\n%s", error)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    config = uvicorn.Config(
        make_app(router),
        log_config=None,
        access_log=False,
        lifespan="on",
        # Whose addresses are not used, so headers cannot lie about them.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(loaded.settings.limits.drain_time)),
    )
    address = f"[{host}]" if ":" in (host := listening.getsockname()[0]) else host
    log.info("serving http://%s:%d", address, listening.getsockname()[1])
    await _Server(config).serve(sockets=[listening])


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn's own raises them again at its end, which would end us before traces are sent.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def _allow_many_files() -> None:
    # Two connections for each request; many systems begin with 1024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bind(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it on, answers wait
    # 40 ms for the client's acknowledgement of their headers.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot listen on {address}:{port}: {reason}; name another address in 'listen'"
        ) from None
    return listening
