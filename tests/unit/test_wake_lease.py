# SPDX-License-Identifier: Apache-2.0
"""Room for weights that wake, and what the account says before, while and after."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kvcached_core._core import Ledger, Member
from kvcached_core.sleep.engine_sleep import EngineSleep
from kvcached_core.sleep.wake_lease import WakeRefused, lease_all
from tests.support.ledger_member import member

MIB = 1 << 20
CAPACITY = 100 * MIB


class NoScheduler:
    def refresh_usage(self, force: bool = False) -> None:
        pass


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "gpu.ledger", CAPACITY, 0)


def _engine(ledger: Ledger, wait_s: float = 0.5, **policy: int) -> tuple[Member, EngineSleep]:
    engine = ledger.join("engine", 40 * MIB, **policy)  # type: ignore[arg-type]
    sleep = EngineSleep(NoScheduler(), {"gpu": (ledger, engine)}, ["gpu", "gpu"], wait_s)  # type: ignore[arg-type]
    return engine, sleep


def _static(member: Member) -> int:
    return member.info().static_bytes


def test_there_and_back(ledger: Ledger) -> None:
    engine, sleep = _engine(ledger)
    sleep.note_away([20 * MIB, 15 * MIB])
    assert _static(engine) == 5 * MIB
    assert ledger.available() == 95 * MIB
    with sleep.waking([20 * MIB, 15 * MIB]):
        assert ledger.available() == 60 * MIB
        assert {m.name for m in ledger.members()} == {"engine", "engine waking"}
    assert _static(engine) == 40 * MIB
    assert ledger.available() == 60 * MIB
    assert [m.name for m in ledger.members()] == ["engine"]
    assert ledger.total_leased() == 0


def test_a_wake_that_fails_gives_the_room_back(ledger: Ledger) -> None:
    engine, sleep = _engine(ledger)
    sleep.note_away([30 * MIB, 0])
    with pytest.raises(ZeroDivisionError), sleep.waking([30 * MIB, 0]):
        _ = 1 // 0
    assert _static(engine) == 10 * MIB and ledger.available() == 90 * MIB
    with sleep.waking([30 * MIB, 0]):
        pass
    assert _static(engine) == 40 * MIB


def test_at_no_moment_is_anything_counted_twice_or_not_at_all(ledger: Ledger) -> None:
    _, sleep = _engine(ledger)
    sleep.note_away([40 * MIB, 0])
    seen: set[int] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(ledger.available())

    watching = threading.Thread(target=look)
    with sleep.waking([40 * MIB, 0]):
        watching.start()
        time.sleep(0.05)
    time.sleep(0.05)
    done.set()
    watching.join()
    assert seen == {60 * MIB}


def test_an_engines_limit_and_guarantee_are_about_its_cache(ledger: Ledger) -> None:
    _, sleep = _engine(ledger, limit=10 * MIB, guarantee=10 * MIB)
    sleep.note_away([40 * MIB, 0])
    with sleep.waking([40 * MIB, 0]):
        pass
    assert sleep.away == 0


def test_refused_with_the_names_of_those_who_hold_it(ledger: Ledger) -> None:
    engine, sleep = _engine(ledger, wait_s=0.2)
    sleep.note_away([40 * MIB, 0])
    greedy = ledger.join("greedy", 20 * MIB)
    assert greedy.lease(60 * MIB)
    begin = time.monotonic()
    with pytest.raises(WakeRefused) as refused, sleep.waking([40 * MIB, 0]):
        raise AssertionError("there was room")
    assert 0.2 <= time.monotonic() - begin < 2
    message = str(refused.value)
    assert "kvcached cannot wake engine: it needs 40.0 MiB" in message
    assert "held by greedy 80.0 MiB" in message
    assert _static(engine) == 0
    assert {m.name for m in ledger.members()} == {"engine", "greedy"}
    assert not ledger.total_demand()


def test_what_others_are_guaranteed_is_not_taken(ledger: Ledger) -> None:
    _, sleep = _engine(ledger, wait_s=0.1)
    sleep.note_away([40 * MIB, 0])
    guaranteed = ledger.join("guaranteed", guarantee=70 * MIB)
    with pytest.raises(WakeRefused), sleep.waking([40 * MIB, 0]):
        raise AssertionError("it took what is another's")
    guaranteed.leave()


def test_a_neighbour_gives_its_cache(tmp_path: Path) -> None:
    path = tmp_path / "gpu.ledger"
    ledger = Ledger(path, CAPACITY, 0)
    engine, sleep = _engine(ledger, wait_s=10)
    sleep.note_away([40 * MIB, 0])
    holder = ledger.join("holder")
    assert holder.lease(90 * MIB)
    holder.set_cached(80 * MIB)

    def answer() -> None:
        while not (asked := holder.ask()[0]):
            time.sleep(0.005)
        holder.set_cached(80 * MIB - asked)
        holder.release(asked)

    giving = threading.Thread(target=answer)
    giving.start()
    with sleep.waking([40 * MIB, 0]):
        pass
    giving.join()
    assert _static(engine) == 40 * MIB
    assert holder.info().leased == 60 * MIB


def test_all_ledgers_or_none(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / f"gpu{i}.ledger", CAPACITY, 0) for i in range(2)]
    owners = [ledger.join("engine") for ledger in ledgers]
    holder = ledgers[1].join("holder")
    assert holder.lease(90 * MIB)
    wanted = [(g, o, 40 * MIB) for g, o in zip(ledgers, owners, strict=True)]
    with pytest.raises(WakeRefused, match="gpu1"):
        lease_all(wanted, 0.1, lambda: None)
    assert ledgers[0].available() == CAPACITY
    holder.release(90 * MIB)
    for lease in lease_all(wanted, 0.1, lambda: None):
        lease.close()
    assert [ledger.available() for ledger in ledgers] == [CAPACITY, CAPACITY]


def test_killed_while_it_wakes(tmp_path: Path) -> None:
    path = tmp_path / "gpu.ledger"
    ledger = Ledger(path, CAPACITY, 0)
    with member(path, name="engine waking", capacity=CAPACITY, live=40 * MIB) as process:
        assert ledger.available() == 60 * MIB
        process.kill()
        process.wait()
        assert ledger.available() == CAPACITY


def test_adopting_more_than_there_is(ledger: Ledger) -> None:
    owner, other = ledger.join("a"), ledger.join("b")
    assert other.lease(10)
    with pytest.raises(ValueError, match="leased only 10"):
        owner.adopt(other, 11)
    with pytest.raises(ValueError, match="another member"):
        owner.adopt(owner, 0)
    elsewhere = Ledger(Path(ledger.path).with_name("x.ledger"), CAPACITY, 0).join("c")
    with pytest.raises(ValueError, match="same ledger"):
        owner.adopt(elsewhere, 0)
    assert (_static(owner), other.info().leased) == (0, 10)
