# SPDX-License-Identifier: Apache-2.0
"""vLLM servers that sleep, and what is left of them meanwhile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvcached_core import Ledger

from .elastic import elastic_env
from .server import Server
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

    def page_bytes(self) -> int:
        """What the kernel holds for pages of the elastic kind."""
        return page_memory(process_tree(self.pid))

    def resident_bytes(self) -> int:
        """Of all its processes, what they share counted once."""
        return sum(psutil.Process(p).memory_full_info().pss for p in process_tree(self.pid))
