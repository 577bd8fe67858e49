# SPDX-License-Identifier: Apache-2.0
"""What ordering the router's queue by deadline is worth: objectives met, beside first come.

    ENGINE_PATCHED=... PYTHONPATH=... python benchmarks/router_deadline.py --out build/deadline.json

Two engines share one queue: `chat`, short prompts that want their first token soon, and `docs`,
long ones with more time. The rate that the two can sustain is measured first. Then the same
arrivals are played at several multiples of it, in bursts, once for each order of the queue.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.elastic import elastic_env
from tests.support.server import Server, free_port
from tests.support.tiny_model import make_tiny_model

REPO = Path(__file__).resolve().parents[1]
MIB = 1 << 20
ORDERS = ("fifo", "slack")
ENGINE_ARGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=4096",
    "--max-num-seqs=16",
    "--no-enable-prefix-caching",
    f"--kv-cache-memory-bytes={256 * MIB}",
)


@dataclass(frozen=True)
class Kind:
    """Requests of one model."""

    name: str
    prompt: int
    answer: int
    ttft: float
    """Seconds within which the first token shall come."""
    share: float
    """Of all requests."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at: float
    kind: Kind


@dataclass(frozen=True)
class Outcome:
    """What became of it; no time if there was no answer."""

    kind: str
    ttft: float | None

    def met(self, kinds: dict[str, Kind]) -> bool:
        return self.ttft is not None and self.ttft <= kinds[self.kind].ttft


def trace(kinds: list[Kind], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals in bursts: every other 5 s have three times the rate of those between."""
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    at = 0.0
    while True:
        busy = int(at / 5) % 2 == 0
        at += source.expovariate(rate * (1.5 if busy else 0.5))
        if at >= seconds:
            return arrivals
        (kind,) = source.choices(kinds, [kind.share for kind in kinds])
        arrivals.append(Arrival(at, kind))


async def ask(session: aiohttp.ClientSession, url: str, kind: Kind, seed: int) -> Outcome:
    source = random.Random(seed)
    prompt = [source.randrange(10, 2000) for _ in range(kind.prompt)]
    body = {"model": kind.name, "prompt": prompt, "max_tokens": kind.answer, "stream": True,
            "ignore_eos": True, "temperature": 0}  # fmt: skip
    begin = time.monotonic()
    first = None
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            return Outcome(kind.name, None)
        async for line in answer.content:
            if first is None and line.startswith(b"data: "):
                first = time.monotonic() - begin
    return Outcome(kind.name, first)


async def play(url: str, arrivals: list[Arrival]) -> list[Outcome]:
    """Sends each request when it is due, whatever became of those before."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        begin = time.monotonic()

        async def one(index: int, arrival: Arrival) -> Outcome:
            await asyncio.sleep(begin + arrival.at - time.monotonic())
            return await ask(session, url, arrival.kind, index)

        return await asyncio.gather(*(one(i, arrival) for i, arrival in enumerate(arrivals)))


async def sustained(url: str, kinds: list[Kind], lanes: int, seconds: float) -> float:
    """Requests a second when so many are always in flight."""
    done = 0
    async with aiohttp.ClientSession() as session:
        end = time.monotonic() + seconds

        async def lane(number: int) -> None:
            nonlocal done
            source = random.Random(number)
            while time.monotonic() < end:
                (kind,) = source.choices(kinds, [kind.share for kind in kinds])
                await ask(session, url, kind, source.randrange(1 << 30))
                done += time.monotonic() < end

        await asyncio.gather(*(lane(number) for number in range(lanes)))
    return done / seconds


class Router:
    """The router as a process, with the order of its queue."""

    def __init__(self, folder: Path, kinds: list[Kind], servers: list[Server], slots: int) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._path = folder / "router.yaml"
        self._kinds, self._servers, self._slots = kinds, servers, slots
        self._folder = folder

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._write("fifo")
        command = [sys.executable, "-m", "kvcached_core.cli.router", "serve", str(self._path)]
        with (self._folder / "router.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log)
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                    break
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)

    def order(self, order: str) -> None:
        """Order the queue so from now on."""
        self._write(order)
        urllib.request.urlopen(f"{self.url}/admin/reload", b"").close()

    def _write(self, order: str) -> None:
        models = [
            {
                "name": kind.name,
                "ttft": kind.ttft,
                "prefill_rate": 10_000,
                "replicas": [{"url": server.url, "gpu": 0}],
                "queue": {"timeout": "60s", "max_waiting": 2000},
            }
            for kind, server in zip(self._kinds, self._servers, strict=True)
        ]
        gpu = {"max_running": self._slots, "order": order}
        settings = {"listen": self.url.removeprefix("http://"), "models": models, "gpus": {0: gpu}}
        self._path.write_text(json.dumps(settings))


def summary(kinds: list[Kind], outcomes: list[Outcome]) -> dict[str, Any]:
    by_name = {kind.name: kind for kind in kinds}
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "met": sum(outcome.met(by_name) for outcome in outcomes),
    }
    for kind in kinds:
        own = [outcome for outcome in outcomes if outcome.kind == kind.name]
        times = sorted(outcome.ttft for outcome in own if outcome.ttft is not None)
        found[kind.name] = {
            "requests": len(own),
            "answered": len(times),
            "met": sum(outcome.met(by_name) for outcome in own),
            "ttft_p50": times[len(times) // 2] if times else None,
            "ttft_p99": times[int(len(times) * 0.99)] if times else None,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/deadline.json"))
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.1, 1.4])
    parser.add_argument("--seconds", type=float, default=30, help="of each trace")
    parser.add_argument("--repeats", type=int, default=2, help="with other arrivals each time")
    parser.add_argument("--slots", type=int, default=4, help="requests that run at a time")
    parser.add_argument("--chat-ttft", type=float, default=1.0)
    parser.add_argument("--docs-ttft", type=float, default=6.0)
    args = parser.parse_args()
    kinds = [Kind("chat", 40, 24, args.chat_ttft, 0.7), Kind("docs", 1500, 48, args.docs_ttft, 0.3)]
    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(folder / "llama")
        servers = []
        for kind in kinds:
            env = elastic_env(folder / "ledger", name=kind.name, page_size="256KiB")
            words = (*ENGINE_ARGS, f"--served-model-name={kind.name}")
            servers.append(Server(kind.name, model, folder, words, env))
        router = Router(folder, kinds, servers, args.slots)
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready()
            with router.running():
                asyncio.run(sustained(router.url, kinds, args.slots, 5))  # warm
                rate = asyncio.run(sustained(router.url, kinds, args.slots, 15))
                print(f"sustained: {rate:.1f} requests a second", flush=True)
                for repeat in range(args.repeats):
                    for load in args.loads:
                        arrivals = trace(kinds, rate * load, args.seconds, seed=repeat)
                        # Not always the same one first: the machine may become slower or faster.
                        for order in ORDERS if repeat % 2 == 0 else ORDERS[::-1]:
                            router.order(order)
                            outcomes = asyncio.run(play(router.url, arrivals))
                            cell = {"load": load, "order": order, "repeat": repeat}
                            cells.append(cell | summary(kinds, outcomes))
                            print(json.dumps(cells[-1]), flush=True)
        finally:
            for server in servers:
                server.stop()
    report = {"sustained": rate, "slots": args.slots, "kinds": [asdict(k) for k in kinds],
              "seconds": args.seconds, "cells": cells}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for load in args.loads:
        line = [f"load {load:g}"]
        for order in ORDERS:
            own = [c for c in cells if c["load"] == load and c["order"] == order]
            line.append(f"{order} {sum(c['met'] for c in own)}/{sum(c['requests'] for c in own)}")
        print("  ".join(line))


if __name__ == "__main__":
    main()
