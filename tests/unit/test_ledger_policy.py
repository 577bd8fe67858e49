# SPDX-License-Identifier: Apache-2.0
"""Policies, asks, bells and records of the ledger, as Python sees them."""

from __future__ import annotations

import fcntl
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcached_core._core import (
    COUNTERS,
    TIMES,
    Arena,
    Geometry,
    Histogram,
    HostBackend,
    Ledger,
    LedgerRefused,
    Mapper,
    Member,
    PagePool,
    VmmError,
)
from tests.support.ledger_locks import MUTEX_BYTE, set_lock
from tests.support.watch import wait_until

CAPACITY = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own" / "ledger"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger(path, CAPACITY)


def set_policy(ledger: Ledger, member: Member, **policy: Any) -> int:
    return ledger.set_policy(member.slot, member.generation, **policy)


# -- policies -------------------------------------------------------------------------------------


def test_defaults(ledger: Ledger) -> None:
    member = ledger.join("m")
    info = member.info()
    assert (info.limit, info.cache_limit) == (None, None)
    assert (info.guarantee, info.weight, info.priority) == (0, 100, 0)
    assert info.desired_version == info.observed_version == 1
    assert (info.asked, info.asked_running, info.returning, info.waiting) == (0, 0, 0, 0)
    assert (info.passed_over, info.trim_pending) == (0, False)
    assert member.ask() == (0, 0)
    assert member.claimable() == CAPACITY
    assert ledger.overdraft() == 0


def test_a_policy_given_at_start(ledger: Ledger) -> None:
    member = ledger.join("m", 10, guarantee=100, limit=400, weight=50, priority=3, cache_limit=200)
    policy = member.policy()
    assert (policy.guarantee, policy.limit, policy.cache_limit) == (100, 400, 200)
    assert (policy.weight, policy.priority) == (50, 3)
    assert policy.version == policy.observed == 1
    assert policy.trim is None
    assert member.claimable() == 400


def test_a_policy_is_set_and_acknowledged(ledger: Ledger) -> None:
    member = ledger.join("m")
    assert member.lease(500)
    member.set_cached(100)
    assert set_policy(ledger, member, limit=300) == 2
    assert set_policy(ledger, member, limit=300) == 2  # as it was
    assert member.ask() == (100, 100)
    assert not member.lease(1)
    info = member.info()
    assert (info.desired_version, info.observed_version) == (2, 1)
    with pytest.raises(ValueError, match="version 3"):
        member.observe(3)
    member.observe(2)
    assert member.info().observed_version == 2
    assert set_policy(ledger, member, limit=-1, cache_limit=5) == 3
    assert (member.policy().limit, member.policy().cache_limit) == (None, 5)
    assert member.ask() == (0, 0)


def test_conflicts_and_wrong_numbers(ledger: Ledger) -> None:
    member = ledger.join("m")
    with pytest.raises(LedgerRefused, match="version 1, not 7"):
        set_policy(ledger, member, weight=5, expected_version=7)
    assert set_policy(ledger, member, guarantee=200, expected_version=1) == 2
    for policy, remedy in (
        ({"limit": 100}, "lower the guarantee"),
        ({"weight": 0}, "1 to 10000"),
        ({"priority": 101}, "0 to 100"),
        ({"guarantee": -1}, "0 to 2"),
        ({"cache_limit": -2}, "-1 for none"),
    ):
        with pytest.raises(ValueError, match=remedy):
            set_policy(ledger, member, **policy)
    with pytest.raises(ValueError, match="below the guarantee"):
        ledger.join("n", guarantee=5, limit=4)
    with pytest.raises(VmmError, match="has left or died"):
        ledger.set_policy(member.slot, member.generation + 1, weight=5)
    assert member.policy().version == 2


def test_admission_names_the_holders(path: Path) -> None:
    ledger = Ledger(path, CAPACITY, 100)
    one = ledger.join("one", 100, guarantee=500)
    with pytest.raises(LedgerRefused, match=r"slot 0 \(one\) has a guarantee of 500.*200 at most"):
        ledger.join("two", 100, guarantee=201)
    assert issubclass(LedgerRefused, VmmError)
    two = ledger.join("two", 100, guarantee=200)
    with pytest.raises(LedgerRefused, match=r"\(two\)"):
        set_policy(ledger, one, guarantee=501)
    assert [event.kind for event in ledger.events()] == ["join", "refused", "join", "refused"]
    two.leave()
    set_policy(ledger, one, guarantee=800)


def test_a_trim_is_pending_until_it_is_done(ledger: Ledger) -> None:
    member = ledger.join("m")
    version = ledger.trim(member.slot, member.generation, cached=True)
    assert member.policy().trim == (version, -1, True)
    assert member.info().trim_pending
    newer = ledger.trim(member.slot, member.generation, 70)
    member.trim_done(version)
    assert member.policy().trim == (newer, 70, False)
    member.trim_done(newer)
    assert member.policy().trim is None
    with pytest.raises(ValueError):
        ledger.trim(member.slot, member.generation, -2)
    with pytest.raises(ValueError):
        member.trim_done(newer + 1)


# -- asks and bells -------------------------------------------------------------------------------


def test_demand_is_met_from_what_others_do_not_use(ledger: Ledger) -> None:
    victim, needy = ledger.join("victim"), ledger.join("needy")
    assert victim.lease(900)
    victim.set_parked(50)
    victim.set_cached(200)
    needy.set_demand(250, waiting=2)
    assert needy.info().waiting == 2
    assert victim.ask() == (150, 0)
    assert victim.claimable() == 0  # the free bytes are for who waits
    assert needy.claimable() == 100
    victim.set_returning(40)
    assert victim.ask() == (110, 0)
    victim.release(150)
    victim.set_returning(0)
    assert victim.ask() == (0, 0)
    assert needy.lease(250)
    assert [event.text for event in ledger.events() if event.kind == "ask"] == ["for slot 1, needy"]


def test_running_requests_go_for_a_higher_priority_only(ledger: Ledger) -> None:
    victim, needy = ledger.join("victim", guarantee=600), ledger.join("needy")
    assert victim.lease(1000)
    needy.set_demand(500)
    assert victim.ask() == (0, 0)
    set_policy(ledger, needy, priority=1)
    assert victim.ask() == (0, 400)


def test_foreign_memory_is_an_overdraft(ledger: Ledger) -> None:
    member = ledger.join("m")
    assert member.lease(900)
    member.add_committed(900)
    member.set_cached(100)
    ledger.set_device_used(1050)
    assert ledger.overdraft() == 50
    assert member.info().asked == 50
    assert ledger.events()[-2].kind == "overdraft"
    assert (ledger.events()[-1].kind, ledger.events()[-1].slot) == ("ask", member.slot)


def test_who_does_not_answer_is_passed_over(ledger: Ledger) -> None:
    slow, other, needy = (ledger.join(name) for name in ("slow", "other", "needy"))
    for member in (slow, other):
        assert member.lease(600 if member is slow else 400)
        member.set_cached(400)
    needy.set_demand(100)
    assert slow.ask() == (100, 0)
    time.sleep(1.1)
    assert other.ask() == (100, 0)
    assert slow.ask() == (0, 0)
    assert slow.info().passed_over == 1
    assert [event.name for event in ledger.events() if event.kind == "passed_over"] == ["slow"]


def test_a_bell_lets_threads_run(ledger: Ledger) -> None:
    member = ledger.join("m")
    seen = member.bell
    ran = threading.Event()

    def ring() -> None:
        ran.set()
        ledger.trim(member.slot, member.generation)

    timer = threading.Timer(0.05, ring)
    timer.start()
    start = time.monotonic()
    assert member.wait_bell(seen, 20_000) != seen
    assert time.monotonic() - start < 10
    assert ran.is_set()
    seen = member.bell
    assert member.wait_bell(seen, 20) == seen
    assert member.wait_bell(seen, 250) == seen
    assert member.wait_bell(seen + 1, 20_000) == seen
    timer.join()


WAITER = """
import sys
from kvcached_core._core import Ledger
path, slot, generation = sys.argv[1], *map(int, sys.argv[2:])
member = Ledger(path).attach(slot, generation)
seen = member.bell
print("waiting", flush=True)
sys.exit(member.wait_bell(seen, 20_000) == seen)
"""


def test_released_bytes_wake_a_process_that_waits(ledger: Ledger) -> None:
    giver, needy = ledger.join("giver"), ledger.join("needy")
    assert giver.lease(CAPACITY)
    needy.set_demand(10)
    arguments = [ledger.path, str(needy.slot), str(needy.generation)]
    with subprocess.Popen(
        [sys.executable, "-c", WAITER, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        needy.set_demand(10)
        giver.release(10)
        assert process.wait(10) == 0


POLICIES = st.fixed_dictionaries(
    {
        "guarantee": st.sampled_from([0, 0, 50, 150]),
        "limit": st.sampled_from([None, 200, 500]),
        "weight": st.integers(1, 300),
        "priority": st.integers(0, 2),
    }
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    policies=st.lists(POLICIES, min_size=1, max_size=5),
    steps=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from(["lease", "demand", "soft", "answer", "used"]),
            st.integers(0, 600),
        ),
        max_size=30,
    ),
)
def test_promises_hold_in_any_order(
    tmp_path: Path, policies: list[dict[str, Any]], steps: list[tuple[int, str, int]]
) -> None:
    (tmp_path / "ledger").unlink(missing_ok=True)
    ledger = Ledger(tmp_path / "ledger", CAPACITY)
    members = [ledger.join(f"m{i}", **policy) for i, policy in enumerate(policies)]
    for index, step, amount in steps:
        member = members[index % len(members)]
        limit = policies[index % len(members)]["limit"]
        if step == "lease":
            claimable = member.claimable()
            assert member.lease(amount) == (amount <= claimable)
            assert limit is None or member.info().leased <= limit
        elif step == "demand":
            member.set_demand(amount)
        elif step == "soft":
            member.set_cached(min(amount, member.info().leased))
        elif step == "used":
            ledger.set_device_used(amount)
        else:
            soft, running = member.ask()
            info = member.info()
            assert soft + running <= info.leased
            assert soft <= info.cached
            assert soft + running == 0 or info.leased - soft - running >= info.guarantee
            member.release(soft)
            member.set_cached(info.cached - soft)
        if ledger.overdraft() == 0:
            assert ledger.total_leased() + ledger.external <= CAPACITY
    for member in members:
        member.leave()


# -- records --------------------------------------------------------------------------------------


def test_counters_and_histograms(ledger: Ledger) -> None:
    member = ledger.join("m")
    for counter in COUNTERS:
        member.count(counter)
    member.count("commits", 4)
    for kind in TIMES:
        member.time(kind, 0.001)
    member.time("step", math.inf)
    info = member.info()
    assert info.counters == dict.fromkeys(COUNTERS, 1) | {"commits": 5}
    assert tuple(info.histograms) == TIMES
    step = info.histograms["step"]
    assert (step.count, len(step.counts), step.counts[7], step.counts[19]) == (2, 20, 1, 1)
    assert info.histograms["map"].sum_s == pytest.approx(0.001)
    assert len(Histogram.bounds()) == 19
    assert Histogram.bounds()[:2] == [1e-5, 2e-5]
    with pytest.raises(ValueError, match="no such counter"):
        member.count("nonsense")
    with pytest.raises(ValueError, match="no such time"):
        member.time("nonsense", 1)
    with pytest.raises(TypeError):
        member.count("commits", -1)


def test_idle_time_is_since_the_last_step(ledger: Ledger) -> None:
    member = ledger.join("m")
    time.sleep(0.05)
    assert member.info().idle_s >= 0.05
    member.touch()
    assert member.info().idle_s < 0.05


def test_events_are_numbered(ledger: Ledger) -> None:
    member = ledger.join("m", 7)
    ledger.note("preempt", member.slot, 40)
    join, preempt = ledger.events()
    assert (join.seq, join.kind, join.slot, join.name, join.bytes) == (1, "join", 0, "m", 7)
    assert (preempt.kind, preempt.bytes) == ("preempt", 40)
    assert abs(join.time - time.time()) < 60
    assert [event.seq for event in ledger.events(since=1)] == [2]
    with pytest.raises(ValueError, match="no kind"):
        ledger.note("nonsense", 0, 0)
    for _ in range(300):
        ledger.note("preempt", -1, 0)
    assert [event.seq for event in ledger.events()] == list(range(47, 303))


def test_a_mapper_hurries_while_another_member_waits(path: Path) -> None:
    ledger = Ledger(path, 1 << 30)
    member, other = ledger.join("m"), ledger.join("other")
    backend = HostBackend("policy-test", 1 << 28)
    page = backend.granularity
    arena = Arena(backend, PagePool(backend, page), Geometry(page, page, 64, 1))
    assert member.lease(64 * page)
    # Rests that outlast the test, after a page each: it ends only if there are none.
    paces = {"pace_pages": 1, "pace_rest": 100_000_000, "pace_longest_ms": 3_600_000}
    mapper = Mapper(arena, on_freed=member, **paces)
    mapper.commit_now([(1, 40)])
    other.set_demand(page, 1)
    mapper.decommit_later([(1, 40)])
    deadline = time.monotonic() + 20
    while mapper.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not mapper.pending
    other.set_demand(0, 0)
    mapper.commit_now([(1, 40)])
    mapper.decommit_later([(1, 40)])
    time.sleep(0.1)
    assert mapper.pending
    mapper.stop()
    arena.close()


def test_a_release_that_the_locked_ledger_refused_is_made_up_for(path: Path) -> None:
    ledger = Ledger(path, 1 << 30)
    member = ledger.join("m")
    backend = HostBackend("policy-test", 1 << 28)
    page = backend.granularity
    arena = Arena(backend, PagePool(backend, page), Geometry(page, page, 64, 1))
    assert member.lease(16 * page)
    mapper = Mapper(arena, on_freed=member, pace_rest=0)
    mapper.commit_now([(1, 9)])
    with path.open("r+b") as file:
        set_lock(file.fileno(), fcntl.F_WRLCK, MUTEX_BYTE)
        mapper.decommit_later([(1, 5)])
        mapper.drain()  # after ten seconds it gave up
    wait_until(lambda: member.info().leased == 12 * page, 20, "released, with nothing else to do")
    mapper.stop()
    arena.close()


def test_a_mapper_times_what_it_commits(path: Path) -> None:
    ledger = Ledger(path, 1 << 30)
    member = ledger.join("m")
    backend = HostBackend("policy-test", 1 << 28)
    page = backend.granularity
    pool = PagePool(backend, page)
    arena = Arena(backend, pool, Geometry(page, page, 64, 1))
    assert member.lease(16 * page)
    mapper = Mapper(arena, on_freed=member)
    mapper.commit_now([(1, 5)])
    mapper.commit_ahead([(5, 9)])
    mapper.decommit_later([(1, 3)])
    mapper.drain()
    info = member.info()
    assert info.histograms["map"].count == 2
    assert info.histograms["map"].sum_s > 0
    assert (info.counters["commits"], info.counters["decommits"]) == (8, 2)
    assert info.leased == 14 * page
    mapper.stop()
    unaccounted = Mapper(arena)
    unaccounted.commit_now([(20, 21)])
    unaccounted.stop()
    assert member.info().counters["commits"] == 8
    arena.close()
