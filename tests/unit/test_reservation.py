# SPDX-License-Identifier: Apache-2.0
"""Memory beside the KV caches: granted or not, given back, and never counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import Config, ConfigError, Ledger
from kvcached_core.reservation import Reservation

MIB = 1 << 20
CAPACITY = 64 * MIB
REPO = Path(__file__).resolve().parents[2]


def config(folder: Path, **settings: object) -> Config:
    return Config.load({"ledger_dir": folder / "own", "capacity": CAPACITY, **settings}, {})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    config_ = config(tmp_path)
    config_.ledger_dir.mkdir(mode=0o700)
    return Ledger(config_.ledger_dir / "host-0.ledger", CAPACITY, 0)


@pytest.fixture
def memory(ledger: Ledger, tmp_path: Path) -> Iterator[Reservation]:
    with Reservation("trainer", config=config(tmp_path)) as reservation:
        yield reservation


def later(seconds: float, action: object, *args: object) -> threading.Timer:
    timer = threading.Timer(seconds, action, args)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_a_size_is_leased_and_committed_alike(ledger: Ledger, memory: Reservation) -> None:
    for size in (40 * MIB, 10 * MIB, 10 * MIB, CAPACITY, 0):
        assert memory.resize(size)
        (info,) = ledger.members()
        assert memory.bytes == info.leased == info.committed == size
        # Nothing of it could be given back at once, so nobody is told that it could.
        assert info.parked == info.cached == info.demand == 0


def test_refused_now_it_stays_as_it_was(ledger: Ledger, memory: Reservation) -> None:
    engine = ledger.join("engine")
    assert memory.resize(8 * MIB) and engine.lease(40 * MIB)
    begin = time.monotonic()
    assert not memory.resize(32 * MIB, timeout_s=0.2)
    assert time.monotonic() - begin >= 0.2
    info = {member.name: member for member in ledger.members()}["trainer"]
    assert (info.leased, info.committed, info.demand) == (8 * MIB, 8 * MIB, 0)


def test_it_waits_until_others_give_back(ledger: Ledger, memory: Reservation) -> None:
    engine = ledger.join("engine")
    assert engine.lease(48 * MIB)
    engine.set_cached(48 * MIB)
    asked: list[int] = []

    def give() -> None:
        while not any(asked):
            asked[:] = engine.ask()
            time.sleep(0.01)
        engine.set_cached(0)
        engine.release(48 * MIB)

    timer = later(0.3, give)
    assert memory.resize(32 * MIB, timeout_s=30)
    timer.join()
    # Its demand was there for the engine to see: 16 MiB were free.
    assert asked == [16 * MIB, 0]
    waits = {m.name: m.histograms["wait"] for m in ledger.members()}["trainer"]
    assert waits.count == 1 and waits.sum_s >= 0.2


def test_a_hold_comes_on_top_and_goes(memory: Reservation) -> None:
    assert memory.resize(4 * MIB)
    with memory.hold(16 * MIB), memory.hold(8 * MIB):
        assert memory.bytes == 28 * MIB
    with pytest.raises(KeyError), memory.hold(16 * MIB):
        raise KeyError
    assert memory.bytes == 4 * MIB


def test_a_hold_in_vain_names_who_holds_what(ledger: Ledger, memory: Reservation) -> None:
    engine = ledger.join("greedy-engine")
    assert engine.lease(60 * MIB)
    with (
        pytest.raises(TimeoutError, match=r"32\.0 MiB.*greedy-engine 60\.0 MiB.*kvctl"),
        memory.hold(32 * MIB, timeout_s=0.05),
    ):
        raise AssertionError("the hold was not granted")
    assert memory.bytes == 0


def test_sizes_that_never_are(memory: Reservation) -> None:
    with pytest.raises(ValueError, match=r"64\.0 MiB for all"):
        memory.resize(CAPACITY + 1, timeout_s=60)
    with pytest.raises(ValueError, match=r"64\.0 MiB for all"), memory.hold(CAPACITY + 1):
        pass
    for call in (memory.resize, lambda size: memory.hold(size).__enter__()):
        with pytest.raises(ValueError, match="-1 bytes"):
            call(-1)


def test_threads_hold_beside_each_other(memory: Reservation) -> None:
    peaks = []

    def work() -> None:
        for _ in range(20):
            with memory.hold(20 * MIB, timeout_s=60):  # three fit
                peaks.append(memory.bytes)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(peaks) == 80 and max(peaks) <= 60 * MIB
    assert memory.bytes == 0


def test_policy_comes_from_the_settings(ledger: Ledger, tmp_path: Path) -> None:
    settings = {"guarantee": "25%", "limit": "32MiB", "weight": 7, "priority": 3}
    with Reservation("trainer", config=config(tmp_path, **settings)) as memory:
        (info,) = ledger.members()
        assert (info.guarantee, info.limit, info.weight, info.priority) == (
            CAPACITY // 4,
            32 * MIB,
            7,
            3,
        )
        assert memory.resize(32 * MIB)
        # Beyond its limit it asks nobody for anything, and gets it once the limit is lifted.
        engine = ledger.join("engine")
        engine.set_cached(16 * MIB if engine.lease(16 * MIB) else 0)
        later(0.3, ledger.set_policy, info.slot, info.generation)
        assert not memory.resize(40 * MIB, timeout_s=0.2)
        assert engine.ask() == (0, 0)
        timer = later(0.2, lambda: ledger.set_policy(info.slot, info.generation, limit=-1))
        assert memory.resize(40 * MIB, timeout_s=30)
        timer.join()


def test_a_limit_is_acknowledged_once_it_holds(ledger: Ledger, memory: Reservation) -> None:
    assert memory.resize(40 * MIB)
    (info,) = ledger.members()
    version = ledger.set_policy(info.slot, info.generation, limit=16 * MIB)
    assert memory.resize(20 * MIB)
    assert ledger.members()[0].observed_version < version
    assert memory.resize(16 * MIB)
    assert ledger.members()[0].observed_version == version


def test_an_idle_reservation_answers_operators(ledger: Ledger, memory: Reservation) -> None:
    assert memory.resize(20 * MIB)
    (info,) = ledger.members()
    assert info.pinned == 20 * MIB
    version = ledger.set_policy(info.slot, info.generation, limit=32 * MIB)
    ledger.trim(info.slot, info.generation)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        (info,) = ledger.members()
        if info.observed_version == version and not info.trim_pending:
            return
        time.sleep(0.02)
    pytest.fail(f"no answer to policy {version}: {info}")


def test_a_guarantee_that_does_not_fit_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    engine = ledger.join("first-engine", guarantee=60 * MIB)
    with pytest.raises(ConfigError, match=r"cannot reserve memory.*first-engine"):
        Reservation("trainer", config=config(tmp_path, guarantee="8MiB"))
    engine.leave()


def test_an_engine_that_does_not_answer_is_passed_over(ledger: Ledger, tmp_path: Path) -> None:
    deaf, kind = ledger.join("deaf"), ledger.join("kind")
    for member, size in ((deaf, 40 * MIB), (kind, 20 * MIB)):
        assert member.lease(size)
        member.set_cached(size)
    stop = threading.Event()

    def answer() -> None:
        while not stop.wait(0.01):
            asked, _ = kind.ask()
            kind.set_cached(kind.info().cached - asked)
            kind.release(asked)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with Reservation("trainer", config=config(tmp_path)) as memory:
            assert memory.resize(16 * MIB, timeout_s=30)
    finally:
        stop.set()
        thread.join()
    assert deaf.info().leased == 40 * MIB and deaf.info().passed_over >= 1
    assert kind.info().leased <= 8 * MIB


def test_closing_gives_everything_back(ledger: Ledger, tmp_path: Path) -> None:
    memory = Reservation("trainer", config=config(tmp_path))
    assert memory.resize(CAPACITY)
    memory.close()
    memory.close()
    assert ledger.members() == [] and ledger.available() == CAPACITY


def test_the_first_one_makes_the_ledger(tmp_path: Path) -> None:
    with Reservation("trainer", "host-other", config(tmp_path)) as memory:
        assert Path(memory.ledger.path) == tmp_path / "own" / "host-other.ledger"
        assert memory.ledger.capacity == CAPACITY


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nvidia-smi -L"):
        Reservation("trainer", "gpu-GPU-00000000-nowhere", config(tmp_path))


def test_the_training_loop_holds_what_it_uses(ledger: Ledger) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "benchmarks.train_beside", "--device", "cpu", "--name", "loop"]
    command += ["--ledger-dir", str(Path(ledger.path).parent), "--capacity", str(CAPACITY)]
    command += ["--base", "2MiB", "--peak", "48MiB", "--phases", "2", "--seconds", "0.3"]
    engine = ledger.join("engine")
    assert engine.lease(32 * MIB)  # so that its first peak has to wait
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = iter(process.stdout)
    assert json.loads(next(lines))["phase"] == "base"
    time.sleep(0.5)
    engine.release(32 * MIB)
    rows = [json.loads(line) for line in lines]
    assert process.wait() == 0
    assert [row["phase"] for row in rows[:-1]] == ["peak", "base", "peak"]
    assert [row["bytes"] for row in rows[:-1]] == [48 * MIB, 2 * MIB, 48 * MIB]
    result = rows[-1]
    assert result["peaks"] == 2 and result["steps"] > 0 and result["steps_per_s"] > 0
    assert result["peak_bytes"] == 48 * MIB and len(result["waits_s"]) == 2
    assert [member.name for member in ledger.members()] == ["engine"]
