# SPDX-License-Identifier: Apache-2.0
"""One model's client: a process that sends requests when they are due and notes what came when.

It reads a `Job` as JSON on a line, prepares everything, prints `ready`, waits for a line with the
time to begin, and writes the `Sent` of every request to the job's file. All times are
`time.perf_counter()`, which all processes of a machine share on Linux.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.serving.patterns import Arrival
from benchmarks.serving.sse import Completion, StreamError

# Shorter than the server's 5 s: a connection it is about to close would lose a request.
_KEEP_ALIVE_S = 2.0
_BEAT_S = 0.01
_REPOSITORY = Path(__file__).resolve().parents[2]
_FIRST_TOKEN = 3  # those below may be special


@dataclass(frozen=True)
class Job:
    """What one client does."""

    url: str
    model: str
    arrivals: list[Arrival]
    out: str
    seed: int = 0
    vocab: int = 128256
    drain_s: float = 120.0
    """How long after the last arrival answers may come."""
    concurrency: int = 0
    """At most so many requests at a time; the next is sent as one ends. 0: as they are due."""
    shared: float = 0.0
    """The part of each prompt, from its beginning, that all have in common."""


@dataclass
class Sent:
    """One request and its answer; times in seconds since the run began."""

    phase: str
    due: float
    sent: float = -1.0
    first: float = -1.0
    last: float = -1.0
    tokens: int = 0
    error: str = ""


def bodies(job: Job) -> list[bytes]:
    """What is sent, made before the clock runs."""
    rng = random.Random(job.seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(_FIRST_TOKEN, job.vocab) for _ in range(count)]

    longest = max((arrival.prompt for arrival in job.arrivals), default=0)
    common = tokens(int(longest * job.shared))
    made = []
    for arrival in job.arrivals:
        same = common[: int(arrival.prompt * job.shared)]
        body = {
            "model": job.model,
            "prompt": same + tokens(arrival.prompt - len(same)),
            "max_tokens": arrival.output,
            "temperature": 0,
            "ignore_eos": True,
            # Or an event could lack its text, and its tokens would come with the next one.
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        made.append(json.dumps(body).encode())
    return made


class Client:
    """Sends a job's requests and follows their answers."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rows = [Sent(a.phase, a.at) for a in job.arrivals]
        self.beats: list[float] = []
        """How late this process was, looked at every 10 ms."""
        self._bodies = bodies(job)
        self._turns = asyncio.Semaphore(job.concurrency) if job.concurrency else None

    async def run(self, begin: float) -> None:
        """Everything; `begin` is when the first second starts."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        heart = asyncio.create_task(self._beat())
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = []
            for arrival, row, body in zip(self.job.arrivals, self.rows, self._bodies, strict=True):
                wait = begin + arrival.at - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                one = self._in_turn(session, row, body, begin, arrival)
                tasks.append(asyncio.create_task(one))
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=self.job.drain_s)
                for task in late:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        heart.cancel()

    async def _in_turn(
        self, session: aiohttp.ClientSession, row: Sent, body: bytes, begin: float, arrival: Arrival
    ) -> None:
        try:
            async with self._turns or nullcontext():
                await self._one(session, row, body, begin, arrival)
        except asyncio.CancelledError:
            row.error = row.error or f"not sent {self.job.drain_s:.0f} s after the last one was due"
            raise

    async def _one(
        self, session: aiohttp.ClientSession, row: Sent, body: bytes, begin: float, arrival: Arrival
    ) -> None:
        answer = Completion()
        headers = {"Content-Type": "application/json"}
        try:
            row.sent = time.perf_counter() - begin
            async with session.post(self.job.url, data=body, headers=headers) as response:
                if response.status != 200:
                    row.error = f"{response.status}: {(await response.text())[:200]}"
                    return
                async for data in response.content.iter_any():
                    now = time.perf_counter() - begin
                    if answer.feed(data):
                        if row.first < 0:
                            row.first = now
                        row.last = now
            row.tokens = answer.tokens or 0
            if row.tokens != arrival.output:
                row.error = f"{row.tokens} tokens instead of {arrival.output}"
        except asyncio.CancelledError:
            row.error = f"not answered {self.job.drain_s:.0f} s after the last request"
            raise
        except (aiohttp.ClientError, OSError, StreamError, asyncio.TimeoutError) as error:
            row.error = repr(error)[:200]

    async def _beat(self) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                due = time.perf_counter() + _BEAT_S
                await asyncio.sleep(_BEAT_S)
                self.beats.append(time.perf_counter() - due)


@dataclass(frozen=True)
class Run:
    """What one client saw."""

    rows: list[Sent]
    beats: list[float]
    begin: float = 0.0
    """`time.perf_counter()` at which the first second began."""


class ClientProcess:
    """A client in a process of its own."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._begin = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.client"],
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(json.dumps(asdict(job)))

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def wait_prepared(self) -> None:
        """Returns once `begin` can be said."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the client of {self.job.url} ended: {self._process.wait()}")

    def begin(self, at: float) -> None:
        """Lets it begin at that time."""
        self._begin = at
        self._say(repr(at))

    def wait(self, timeout_s: float) -> Run:
        """What it saw.

        Raises:
            RuntimeError: it failed.
        """
        code = self._process.wait(timeout_s)
        if code:
            raise RuntimeError(f"the client of {self.job.url} ended with {code}")
        found: dict[str, Any] = json.loads(Path(self.job.out).read_text())
        return Run([Sent(**row) for row in found["rows"]], found["beats"], self._begin)

    def kill(self) -> None:
        """Ends it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def play(jobs: Sequence[Job], timeout_s: float) -> list[Run]:
    """Runs all jobs at the same time, each in its own process."""
    clients = [ClientProcess(job) for job in jobs]
    try:
        for client in clients:
            client.wait_prepared()
        begin = time.perf_counter() + 0.5
        end = begin + timeout_s
        for client in clients:
            client.begin(begin)
        return [client.wait(max(end - time.perf_counter(), 1.0)) for client in clients]
    finally:
        for client in clients:
            client.kill()


def main() -> None:
    given = json.loads(sys.stdin.readline())
    given["arrivals"] = [Arrival(**arrival) for arrival in given["arrivals"]]
    client = Client(Job(**given))
    print("ready", flush=True)
    asyncio.run(client.run(float(sys.stdin.readline())))
    result = {"rows": [asdict(row) for row in client.rows], "beats": client.beats}
    Path(client.job.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
