# SPDX-License-Identifier: Apache-2.0
"""Servers that sleep, and what is left of them meanwhile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvcached_core import Ledger

from .elastic import elastic_env
from .server import HttpServer, Server
from .sglang_server import SglangHost, SglangServer
from .watch import page_memory, process_tree

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
        self, name: str, model: Path, folder: Path, args: tuple[str, ...], **settings: str
    ) -> None:
        env = elastic_env(
            folder / "ledger", name=name, weights_dir=str(folder / "weights"), **settings
        )
        env["VLLM_SERVER_DEV_MODE"] = "1"
        super().__init__(name, model, folder, (*args, "--enable-sleep-mode"), env)

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
        super().__init__(name, model, folder, ("--enable-memory-saver", *args), env, host=host)

    def try_sleep(self, *tags: str) -> tuple[int, str]:
        return self.post("/release_memory_occupation", {"tags": tags} if tags else {})

    def try_wake(self, *tags: str) -> tuple[int, str]:
        return self.post("/resume_memory_occupation", {"tags": tags} if tags else {})

    def sleep(self, *tags: str) -> None:
        status, text = self.try_sleep(*tags)
        assert status == 200, text

    def wake(self, *tags: str) -> None:
        status, text = self.try_wake(*tags)
        assert status == 200, text


def page_bytes(server: HttpServer) -> int:
    """What the kernel holds for pages of the elastic kind."""
    return page_memory(process_tree(server.pid))


def resident_bytes(server: HttpServer) -> int:
    """Of all its processes, what they share counted once."""
    return sum(psutil.Process(p).memory_full_info().pss for p in process_tree(server.pid))
