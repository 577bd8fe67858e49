# SPDX-License-Identifier: Apache-2.0
"""Three servers with guarantees under bursts; one's limit lowered while idle; a fourth refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from kvcached_core import Ledger
from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account
from tests.support.engines import EngineHost, Job
from tests.support.load import SteadyLoad, check_complete
from tests.support.prompts import equal_prompts
from tests.support.server import burst
from tests.support.trio import CAPACITY, GUARANTEES
from tests.support.watch import LedgerWatch, page_memory, process_tree, wait_until

pytest_plugins = ["tests.support.trio"]
pytestmark = [pytest.mark.timeout(600), pytest.mark.alone]

LENGTH, ANSWER = 1050, 64  # 9 blocks at the end: 2.25 MiB
IN_FLIGHT = {"large": 20, "middle": 14, "small": 10}  # each wants more than it can ever have


def test_policies_come_from_the_environment(trio: Cluster) -> None:
    assert {name: info.guarantee for name, info in trio.at_start.items()} == GUARANTEES


def test_each_reaches_its_guarantee_while_the_others_want_more(trio: Cluster) -> None:
    reached: set[str] = set()

    def all_reached() -> bool:
        members = {info.name: info for info in trio.ledger.members()}
        for name, guarantee in GUARANTEES.items():
            others_wait = all(info.waiting for other, info in members.items() if other != name)
            if others_wait and members[name].leased >= guarantee:
                reached.add(name)
        return len(reached) == len(GUARANTEES)

    with LedgerWatch(trio.path) as watch, ExitStack() as loads:
        # Staggered, the small one first: it takes what nobody else is guaranteed.
        for seed, name in enumerate(reversed(GUARANTEES)):
            load = SteadyLoad(trio.servers[name], IN_FLIGHT[name], LENGTH, ANSWER, seed)
            loads.enter_context(load)
            wait_until(lambda name=name: trio.member(name).waiting > 0, 60, f"{name} is full")
        wait_until(all_reached, 60, f"each at its guarantee; so far {sorted(reached)}")
        # Leaving the loads has checked that every request was answered in full.
    check_account(watch)
    assert watch.peak_leased() > 0.9 * CAPACITY, "they never wanted more than there is"
    for name, guarantee in GUARANTEES.items():
        # What others are guaranteed was never lent.
        assert watch.peak_leased(name) <= CAPACITY - sum(GUARANTEES.values()) + guarantee


class LimitWatch:
    """When a member's limit was set, and when it came down to it."""

    def __init__(self, ledger: Ledger, name: str, limit: int) -> None:
        self.set_at: float | None = None
        self.met_at: float | None = None
        self._stop = threading.Event()
        self._args = ledger, name, limit
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        ledger, name, limit = self._args
        while not self._stop.wait(0.002) and self.met_at is None:
            (info,) = [member for member in ledger.members() if member.name == name]
            if self.set_at is None and info.limit == limit:
                self.set_at = time.monotonic()
            if self.set_at is not None and info.leased <= limit:
                self.met_at = time.monotonic()

    def __enter__(self) -> LimitWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def kvctl(cluster: Cluster, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcached_core.cli.kvctl", *args]
    command += ["--ledger-dir", str(cluster.path.parent), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_limit_lowered_while_idle_takes_effect_within_a_second(trio: Cluster) -> None:
    server, limit = trio.servers["small"], 6 * MIB
    prompts = equal_prompts(6, LENGTH, seed=900)
    check_complete(burst(server, prompts, 8), 8)
    wait_until(lambda: trio.member("small").demand == 0, 15, "the server is idle")
    before = trio.member("small")
    # 6 prompts of 8 full blocks; nothing runs, and all of it would be reused.
    assert before.leased >= before.cached >= 12 * MIB

    with LimitWatch(trio.ledger, "small", limit) as watch:
        done = kvctl(trio, "limit", "small", "6MiB")
        after = trio.member("small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["acknowledged"] is True
    assert after.limit == limit and after.observed_version == after.desired_version
    assert after.leased <= limit, "acknowledged, and not so"
    assert watch.set_at is not None and watch.met_at is not None
    took = watch.met_at - watch.set_at
    print(
        f"{(before.leased - after.leased) / MIB:.1f} MiB of an idle server in {took * 1e3:.0f} ms"
    )
    assert took <= 1.0
    # Not only by the account: the kernel has the pages back.
    wait_until(lambda: page_memory(process_tree(server.pid)) <= limit, 5, "pages unmapped")

    with LedgerWatch(trio.path) as ledger_watch:
        check_complete(burst(server, prompts, 32), 32)
    assert ledger_watch.peak_leased("small") <= limit
    done = kvctl(trio, "limit", "small", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert trio.member("small").limit is None


def test_a_limit_below_the_guarantee_is_refused(trio: Cluster) -> None:
    done = kvctl(trio, "limit", "large", "1MiB")
    assert done.returncode == 1
    assert "guarantee" in done.stderr
    assert trio.member("large").limit is None


def test_a_fourth_whose_guarantee_does_not_fit_is_refused_at_start(
    trio: Cluster, patched: EngineHost
) -> None:
    since = trio.last_event()
    # 12 MiB are guaranteed to nobody.
    env = trio.env("fourth", guarantee="16MiB")
    result = patched.run(Job(trio.model, [[[5]]], env=env))
    assert result.code == 1, f"started, or was killed ({result.code}): {result.log[-3000:]}"
    message = result.log[result.log.rindex("cannot start") :]
    for name in GUARANTEES:
        assert name in message, message
    assert "fourth" not in {info.name for info in trio.ledger.members()}
    assert trio.events("refused", "fourth", since), "nobody could see later why it did not start"
    # The three go on as before.
    for name, server in trio.servers.items():
        check_complete(burst(server, equal_prompts(2, 200, seed=950), 8), 8)
        assert trio.member(name).guarantee == GUARANTEES[name]
