# SPDX-License-Identifier: Apache-2.0
"""The servers of one system: started, warmed up, watched, and ended whatever happens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.systems import System
from kvcached_core.config import Config
from kvcached_core.mps import Mps, client_environment
from tests.support.server import Server

NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy")
PROFILED = "GPU KV cache size"
"""What an engine logs when it has measured its memory."""
RETRY_S = 60.0
"""A server that failed is not tried again with less time left."""


def names(count: int) -> list[str]:
    """Of so many servers."""
    return [NAMES[i] if i < len(NAMES) else f"server{i}" for i in range(count)]


class StartFailed(RuntimeError):
    """A server did not become ready; the message ends with the end of its output."""


@dataclass(frozen=True)
class Plan:
    """Everything that the servers of a system have in common."""

    system: System
    model: Path
    args: Sequence[str]
    env: dict[str, str]
    logs: Path
    ledger: Path
    fixed: bool = False
    """Whether the servers run with what makes CPU engines comparable."""
    deadline: float = float("inf")
    """Of `time.monotonic()`: all servers are ready by then."""
    start: str = ""
    """Overrides the system's own order of starting."""


@dataclass
class Fleet:
    """Running servers."""

    servers: list[Server]
    start_s: dict[str, float] = field(default_factory=dict)
    retried: dict[str, str] = field(default_factory=dict)
    """Servers that became ready at the second try only, and what was wrong with the first."""
    mps: Mps | None = None
    ledger: Path | None = None
    plan: Plan | None = None
    env: dict[str, str] = field(default_factory=dict)

    def restart(self, name: str, limit_s: float) -> Server:
        """A new server in place of one that has ended.

        Raises:
            StartFailed: it does not become ready.
        """
        assert self.plan is not None
        index = next(i for i, server in enumerate(self.servers) if server.name == name)
        self.servers[index].stop()
        server = self.servers[index] = _server(self.plan, name, self.env)
        begin = time.monotonic()
        try:
            server.start().wait_ready(timeout_s=limit_s)
        except RuntimeError as error:
            raise StartFailed(str(error)) from None
        self.start_s[name] = round(time.monotonic() - begin, 1)
        return server

    def preemptions(self) -> list[int]:
        """Of each server, since it started; 0 where it does not answer any more."""
        found = []
        for server in self.servers:
            try:
                found.append(int(server.metrics().get("vllm:num_preemptions_total", 0)))
            except OSError:
                found.append(0)
        return found

    def dead(self) -> list[str]:
        """Servers that ended by themselves."""
        return [s.name for s in self.servers if s.code is not None]

    def tails(self, size: int = 2000) -> dict[str, str]:
        """The end of every server's output."""
        return {server.name: server.output()[-size:] for server in self.servers}


@contextmanager
def running(plan: Plan, count: int) -> Iterator[Fleet]:
    """`count` servers, ready.

    Raises:
        StartFailed: one of them is not, at the second try either.
        MpsError: MPS was asked for and cannot run.
    """
    system = plan.system
    fleet = Fleet([], ledger=plan.ledger if system.kind == "elastic" else None, plan=plan)
    with ExitStack() as stack:
        env = dict(plan.env)
        if system.mps:
            fleet.mps = Mps()
            running_already = fleet.mps.pid() is not None
            fleet.mps.start()
            if not running_already:
                stack.callback(fleet.mps.stop, force=True)
            env |= client_environment(Config(), fleet.mps.directory)
        fleet.env = env
        stack.callback(_stop_all, fleet.servers)
        for name in names(count):
            # What it said in an earlier run is not what it says now.
            (plan.logs / f"{name}.log").unlink(missing_ok=True)
            fleet.servers.append(_server(plan, name, env))
        _start(plan, fleet)
        if fleet.mps is not None:
            _check_clients(fleet.mps, count)
        yield fleet


def _server(plan: Plan, name: str, env: dict[str, str]) -> Server:
    return Server(
        name,
        plan.model,
        plan.logs,
        plan.args,
        plan.system.environment(name, plan.ledger, env),
        plan.system.flavor,
        fixed=plan.fixed,
    )


def _start(plan: Plan, fleet: Fleet) -> None:
    order = plan.start or plan.system.start
    begun: dict[str, float] = {}
    failures: dict[str, str] = {}

    def begin(server: Server) -> None:
        begun[server.name] = time.monotonic()
        server.start()

    def finish(server: Server) -> None:
        try:
            server.wait_ready(timeout_s=max(plan.deadline - time.monotonic(), 1.0))
        except RuntimeError as error:
            failures[server.name] = str(error)
            server.stop()
        else:
            fleet.start_s[server.name] = round(time.monotonic() - begun[server.name], 1)

    if order == "one":
        for server in fleet.servers:
            begin(server)
            finish(server)
            if failures:
                break
    else:
        with ThreadPoolExecutor(len(fleet.servers)) as pool:
            ends = []
            for server in fleet.servers:
                begin(server)
                ends.append(pool.submit(finish, server))
                if order == "stagger":
                    _wait_profiled(plan, server)
            for end in ends:
                end.result()
    for server in fleet.servers[:]:
        if server.name in fleet.start_s:
            continue
        failure = failures.get(server.name)
        if failure is not None:
            if plan.deadline - time.monotonic() < RETRY_S:
                raise StartFailed(failure)
            # Starting beside others can go wrong; alone it is the same engine.
            fleet.retried[server.name] = failure[-1500:]
        fleet.restart(server.name, max(plan.deadline - time.monotonic(), 1.0))


def _wait_profiled(plan: Plan, server: Server) -> None:
    """Until it has measured its memory: from then on the next one does not disturb it."""
    while server.code is None and time.monotonic() < plan.deadline:
        if PROFILED in server.output():
            return
        time.sleep(0.1)


def _stop_all(servers: list[Server]) -> None:
    # Together: each takes seconds.
    with ThreadPoolExecutor(len(servers) or 1) as pool:
        list(pool.map(lambda server: server.stop(15.0), servers))


def _check_clients(mps: Mps, count: int) -> None:
    clients = mps.status().clients
    if len(clients) < count:
        raise StartFailed(f"MPS has {len(clients)} clients, and {count} engines were started")


def raise_file_limit() -> int:
    """As many open files as this user may have: every request in flight is one, on both sides."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 20) if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def compile_cache(folder: Path) -> dict[str, str]:
    """Where all servers of a run keep compiled code, unless the environment says it."""
    if "VLLM_CACHE_ROOT" in os.environ:
        return {}
    return {"VLLM_CACHE_ROOT": str(folder)}
