# SPDX-License-Identifier: Apache-2.0
"""Several servers on one ledger, each with settings of its own."""

from __future__ import annotations

from pathlib import Path

from kvcached_core import Ledger
from kvcached_core._core import LedgerEvent, MemberInfo
from kvcached_core.cli import as_json

from .elastic import elastic_env, ledger_path
from .server import HttpServer, Server, VllmHost
from .watch import wait_until

MIB = 1 << 20


class Cluster:
    """Servers that share `capacity` bytes of host memory.

    Args:
        args: of all servers.
        host: what they are forks of; without one they are started as a user does.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        capacity: int,
        args: tuple[str, ...],
        host: VllmHost | None = None,
    ) -> None:
        self.model = model
        self.folder = folder
        self.capacity = capacity
        self.path = ledger_path(folder / "ledger")
        self.servers: dict[str, HttpServer] = {}
        self.at_start: dict[str, MemberInfo] = {}
        """What the ledger said of each server when it was ready."""
        self._args = args
        self._host = host
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self.path)
        return self._ledger

    def env(self, name: str, **settings: str) -> dict[str, str]:
        """The environment of an engine on this ledger; `settings` are KVCACHED_* variables."""
        values = {
            "name": name,
            "capacity": str(self.capacity),
            "page_size": "256KiB",  # one block of the tiny Llama
            "parked": "1MiB",
            "parked_decay_ms": "500",
        } | settings
        return elastic_env(self.path.parent, **values)

    def server(self, name: str, *args: str, **settings: str) -> Server:
        """One more server, not started yet."""
        env = self.env(name, **settings)
        server = Server(name, self.model, self.folder, (*self._args, *args), env, host=self._host)
        self.servers[name] = server
        return server

    def start(self) -> Cluster:
        for server in self.servers.values():
            server.start()
        for name, server in self.servers.items():
            server.wait_ready()
            self.at_start[name] = self.member(name)
        return self

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()

    def member(self, name: str) -> MemberInfo:
        """What the ledger says of a server; it must be alive."""
        (info,) = [m for m in self.ledger.members() if m.name == name and m.alive]
        return info

    def set_policy(self, name: str, **policy: int) -> int:
        info = self.member(name)
        return self.ledger.set_policy(info.slot, info.generation, **policy)

    def empty(self, name: str) -> None:
        """Has an idle server give back all that is cached or parked."""
        info = self.member(name)
        self.ledger.trim(info.slot, info.generation, -1, cached=True)
        try:
            wait_until(lambda: not self.member(name).trim_pending, 15, f"{name} trimmed")
        except AssertionError as error:
            said = self.servers[name].output()[-3000:]
            raise AssertionError(f"{error}: {as_json.member(self.member(name))}\n{said}") from None

    def events(self, kind: str, name: str, since: int = 0) -> list[LedgerEvent]:
        return [e for e in self.ledger.events(since) if e.kind == kind and e.name == name]

    def last_event(self) -> int:
        """The number of the latest event, to look for later ones."""
        return max((event.seq for event in self.ledger.events()), default=0)
