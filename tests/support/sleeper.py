# SPDX-License-Identifier: Apache-2.0
"""Servers that sleep, and what is left of them meanwhile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kvcached_core import Ledger

from .elastic import check_account, elastic_env
from .prompts import Prompt
from .server import HttpServer, Server, VllmHost, burst
from .sglang_server import SglangHost, SglangServer
from .watch import LedgerWatch, page_memory, process_tree

MIB = 1 << 20


@dataclass(frozen=True)
class Account:
    """One member's bytes."""

    leased: int
    committed: int
    static: int


def account(ledger: Ledger, name: str) -> Account:
    member = next(m for m in ledger.members() if m.name == name and m.alive)
    return Account(member.leased, member.committed, member.static_bytes)


class Sleeper(Server):
    """A server with the engine's endpoints for sleep."""

    def __init__(
        self, name: str, model: Path, folder: Path, host: VllmHost, *args: str, **settings: str
    ) -> None:
        env = elastic_env(
            folder / "ledger", name=name, weights_dir=str(folder / "weights"), **settings
        )
        env["VLLM_SERVER_DEV_MODE"] = "1"
        super().__init__(name, model, folder, (*args, "--enable-sleep-mode"), env, host=host)

    def sleep(self, level: int = 1) -> None:
        status, text = self.post(f"/sleep?level={level}", {})
        assert status == 200, text

    def try_wake(self, *tags: str, timeout_s: float = 60.0) -> tuple[int, str]:
        query = "&".join(f"tags={tag}" for tag in tags)
        return self.post(f"/wake_up?{query}", {}, timeout_s)

    def wake(self, *tags: str) -> None:
        status, text = self.try_wake(*tags)
        assert status == 200, text

    @property
    def sleeping(self) -> bool:
        return bool(json.loads(self.get("/is_sleeping"))["is_sleeping"])


class SglangSleeper(SglangServer):
    """A server with SGLang's memory saver."""

    def __init__(
        self, name: str, model: Path, folder: Path, host: SglangHost, *args: str, **settings: str
    ) -> None:
        env = elastic_env(
            folder / "ledger", name=name, weights_dir=str(folder / "weights"), **settings
        )
        if "--tp-size=2" in args:
            # Else SGLang wants a NUMA node for each rank, and NCCL on a CPU too.
            env |= {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "none"}
        args = ("--enable-memory-saver", *args)
        super().__init__(name, model, folder, args, env, host=host, quiet=False)

    def try_sleep(self, *tags: str, level: int = 1) -> tuple[int, str]:
        body = ({"tags": tags} if tags else {}) | ({"level": level} if level != 1 else {})
        return self.post("/release_memory_occupation", body)

    def try_wake(self, *tags: str) -> tuple[int, str]:
        return self.post("/resume_memory_occupation", {"tags": tags} if tags else {})

    def sleep(self, *tags: str, level: int = 1) -> None:
        status, text = self.try_sleep(*tags, level=level)
        assert status == 200, text

    def wake(self, *tags: str) -> None:
        status, text = self.try_wake(*tags)
        assert status == 200, text


def page_bytes(server: HttpServer) -> int:
    """What the kernel holds for pages of the elastic kind."""
    return page_memory(process_tree(server.pid))


def resident_bytes(server: HttpServer) -> int:
    """Of all its processes, what they share counted once.

    Without the files of the installation: what counts for one process changes as others come and go
    that run the same libraries, those of tests beside this one among them.
    """
    total = 0
    for pid in process_tree(server.pid):
        for mapping in psutil.Process(pid).memory_maps():
            path = Path(mapping.path)
            if path.is_relative_to(server.log.parent) or not path.is_file():
                total += mapping.pss
    return total


def tokens_of(server: HttpServer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Of its answers, all of which must be good."""
    answers = burst(server, prompts, 16)
    for answer in answers:
        assert answer.status == 200, answer.error
    return [answer.tokens for answer in answers]


@dataclass
class Alone:
    """A server, and what it answered before it ever slept."""

    server: Sleeper | SglangSleeper
    ledger: Ledger
    prompts: list[Prompt]
    tokens: list[list[int]] = field(default_factory=list)

    def ask(self) -> list[list[int]]:
        return tokens_of(self.server, self.prompts)


def take_turns(
    servers: Sequence[Sleeper | SglangSleeper], prompts: Sequence[Prompt], folder: Path
) -> None:
    """Start two servers of one model on memory for the weights of one, and wake them in turn."""
    expected = []
    for server in servers:
        server.start().wait_ready()
        expected.append(tokens_of(server, prompts))
        server.sleep()
    assert expected[0] == expected[1]
    # Equal weights: one copy for both.
    kept = [p for p in (folder / "weights").iterdir() if p.suffix == ".weights"]
    assert len(kept) == 1
    with LedgerWatch(folder / "ledger" / "host-0.ledger") as watch:
        for turn in range(8):
            server, other = servers[turn % 2], servers[1 - turn % 2]
            server.wake()
            # Its weights leave no room for the other's.
            status, text = other.try_wake()
            assert status == 503 and server.name in text
            assert tokens_of(server, prompts) == expected[0]
            server.sleep()
    check_account(watch)
