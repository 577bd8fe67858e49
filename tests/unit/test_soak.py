# SPDX-License-Identifier: Apache-2.0
"""Hundreds of members killed at any instant: the account stays exact and nothing is lost.

A member lives while one of its processes holds a lock on the file, which the kernel drops with the
process. Process ids are only shown, so one that is used again, or that means another process in
another PID namespace, cannot matter; the last test has two members with the same one.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import pytest

from kvcached_core import Ledger, Member
from kvcached_core._core import LedgerEvent
from tests.support.soak_member import PAGE, quietly

pytestmark = pytest.mark.timeout(120)

CYCLES = 500
ALIVE = 6  # members at a time, with the survivor more than the machine has cores
CAPACITY = 256 * PAGE
OWN = 16 * PAGE
LIMIT_S = 0.1

T = TypeVar("T")


def run_queue_s() -> float:
    """For how long this thread could have run and others did."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Survivor:
    """A member that sees the others die; each of its operations is timed.

    What counts is how long an operation was held up by the ledger, so the time for which this
    thread was ready and other processes had the processors is not part of it.
    """

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path, CAPACITY, 0)
        self.member: Member = self.ledger.join("survivor", guarantee=OWN)
        assert self.member.lease(OWN)
        self.slowest_s = 0.0
        self.operations = 0
        self.most_committed = 0

    def timed(self, operation: Callable[[], T], limit_s: float = LIMIT_S) -> T:
        waited, begin = run_queue_s(), time.monotonic()
        result = operation()
        took = time.monotonic() - begin - (run_queue_s() - waited)
        self.slowest_s = max(self.slowest_s, took)
        self.operations += 1
        assert took < limit_s, f"an operation of the survivor took {took:.3f} s"
        return result

    def check(self) -> None:
        """What holds at every moment."""
        members = self.timed(self.ledger.members)
        assert sum(info.leased for info in members) <= CAPACITY
        self.most_committed = max(self.most_committed, sum(info.committed for info in members))
        (own,) = [info for info in members if info.slot == self.member.slot]
        assert (own.leased, own.name, own.alive) == (OWN, "survivor", True)
        # Policy is kept, too: what is guaranteed to somebody was not lent to others.
        assert self.timed(self.ledger.available) <= CAPACITY - OWN

    def work(self) -> None:
        """Takes and gives back, so that its account goes through the others' deaths."""
        if self.timed(lambda: self.member.lease(PAGE)):
            assert self.timed(self.member.info).leased == OWN + PAGE
            self.timed(lambda: self.member.release(PAGE))


class News:
    """Reads a ledger's events once each."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._seen = 0

    def take(self, kind: str) -> list[LedgerEvent]:
        events = self._ledger.events(self._seen)
        self._seen = max([self._seen, *(event.seq for event in events)])
        return [event for event in events if event.kind == kind]


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.ForkServerContext:
    """Starts members from a process that has the core loaded and no ledger open."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.soak_member"])
    return context


def test_killed_at_any_instant(
    tmp_path: Path, forks: multiprocessing.context.ForkServerContext
) -> None:
    path = tmp_path / "own" / "host-0.ledger"
    survivor = Survivor(path)
    rng = random.Random(3)
    living: list[BaseProcess] = []

    def start(seed: int) -> None:
        kind = "pages" if seed % 3 == 0 else "account"
        process = forks.Process(target=quietly, args=(kind, path, seed), daemon=True)
        process.start()
        living.append(process)

    try:
        for seed in range(ALIVE):
            start(seed)
        news, deaths = News(survivor.ledger), 0
        begin = time.monotonic()
        for seed in range(ALIVE, ALIVE + CYCLES):
            # From its very first instructions on, up to when it has been busy for a while.
            pause = rng.choice((0.0, rng.uniform(0, 0.01), rng.uniform(0, 0.08)))
            end = time.monotonic() + pause
            while time.monotonic() < end:
                survivor.check()
                survivor.work()
            victim = living.pop(rng.choice((-1, rng.randrange(len(living)))))
            assert victim.exitcode is None, f"a member ended by itself: {failures(path)}"
            victim.kill()
            victim.join()
            # Operations that need no memory must not wait for the dead either.
            survivor.timed(survivor.ledger.reap)
            survivor.check()
            members = survivor.timed(survivor.ledger.members)
            assert len(members) <= len(living) + 1, "slots of the dead are not free again"
            assert all(info.alive for info in members)
            start(seed)
            deaths += len(news.take("died"))
        lasted = time.monotonic() - begin
    finally:
        for process in living:
            process.kill()
        for process in living:
            process.join()
    assert not failures(path)
    # The next operation after the last deaths may have all of it, with no reaping before.
    assert survivor.timed(lambda: survivor.member.lease(CAPACITY - OWN))
    assert [info.name for info in survivor.ledger.members()] == ["survivor"]
    survivor.member.release(CAPACITY - OWN)
    assert survivor.ledger.available() == CAPACITY - OWN
    assert survivor.ledger.total_leased() == OWN
    # And so may as many members as there are slots, less the survivor's: none is lost.
    crowd = [survivor.ledger.join(f"late-{i}") for i in range(63)]
    for member in crowd:
        member.leave()
    print(
        f"{CYCLES} kills in {lasted:.1f} s, {deaths} of them members by then; the slowest of "
        f"{survivor.operations} operations took {survivor.slowest_s * 1e3:.1f} ms"
    )
    # Most were killed as members, not before they were any.
    assert deaths > CYCLES // 2
    assert survivor.most_committed > 16 * PAGE, "the members with pages never got far"


def failures(path: Path) -> list[str]:
    return [file.read_text() for file in path.parent.glob("*.failed-*")]


@contextmanager
def holder(path: Path, amount: int, *prefix: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A member that holds `amount`, and its process id as it sees it itself."""
    command = [*prefix, sys.executable, "-m", "tests.support.soak_member", str(path), str(amount)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline().split()
        assert len(line) == 3, "the member failed to start"
        yield process, int(line[2])
    finally:
        process.kill()
        process.communicate()


def test_a_killed_holder_pays_back_with_the_next_lease(tmp_path: Path) -> None:
    survivor = Survivor(tmp_path / "own" / "host-0.ledger")
    rest = CAPACITY - OWN
    for _ in range(5):
        with holder(Path(survivor.ledger.path), rest) as (process, _):
            assert not survivor.timed(lambda: survivor.member.lease(rest))
            process.kill()
            process.wait()
            # The first operation after its death: no reaping, no second try.
            assert survivor.timed(lambda: survivor.member.lease(rest))
            survivor.member.release(rest)


UNSHARE = ("unshare", "--pid", "--fork", "--kill-child")


def namespaces_work() -> str:
    """Why no PID namespace can be made here; empty if one can."""
    if shutil.which("unshare") is None:
        return "no unshare on this machine"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip()


def test_members_of_separate_pid_namespaces(tmp_path: Path) -> None:
    reason = namespaces_work()
    if reason:
        pytest.skip(f"PID namespaces cannot be made here: {reason}")
    survivor = Survivor(tmp_path / "own" / "host-0.ledger")
    path = Path(survivor.ledger.path)
    half = (CAPACITY - OWN) // 2
    with holder(path, half, *UNSHARE) as (first, pid), holder(path, half, *UNSHARE) as (_, other):
        assert pid == other == 1  # and a process with that id lives here, too
        assert os.getpid() != 1
        held = [info for info in survivor.ledger.members() if info.name == "holder"]
        assert [(info.pid, info.alive) for info in held] == [(1, True)] * 2
        assert not survivor.timed(lambda: survivor.member.lease(PAGE))
        first.kill()  # and with it, by --kill-child, the first process of its namespace
        first.wait()
        wait_for_death(survivor)
        assert survivor.timed(lambda: survivor.member.lease(half))
        alive = [info for info in survivor.ledger.members() if info.name == "holder"]
        assert [info.alive for info in alive] == [True]
        assert not survivor.timed(lambda: survivor.member.lease(PAGE))


def wait_for_death(survivor: Survivor) -> None:
    """The killed process is a grandchild: nobody here is told when the kernel is done with it."""
    end = time.monotonic() + 30
    while all(info.alive for info in survivor.ledger.members()):
        assert time.monotonic() < end, "the member outlives its kill"
        time.sleep(0.005)
