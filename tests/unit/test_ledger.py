# SPDX-License-Identifier: Apache-2.0
"""The ledger: promises never exceed the device, the dead pay back, bad files are refused."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core._core import Ledger, LedgerRefused, Member, VmmError
from tests.support.ledger_locks import MEMBER_BYTES, MUTEX_BYTE, set_lock

CAPACITY = 1000
SLOT_BYTES = 2048
FILE_BYTES = 4096 + 64 * SLOT_BYTES + 256 * 256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own" / "ledger"


# -- against a model ------------------------------------------------------------------------------


@dataclass
class ModelMember:
    ledger: Ledger
    member: Member
    static: int
    leased: int = 0
    committed: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """Several Ledger objects act as several processes would; `kill` is a member whose lock goes."""

    @initialize(headroom=st.integers(0, 300), ledgers=st.integers(1, 3))
    def start(self, headroom: int, ledgers: int) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.headroom = headroom
        self.external = 0
        path = self.directory / "ledger"
        self.ledgers = [Ledger(path, CAPACITY, headroom) for _ in range(ledgers)]
        self.members: list[ModelMember] = []
        self.dead_leases = 0

    def teardown(self) -> None:
        for entry in getattr(self, "members", []):
            entry.member.leave()
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    def non_kv(self) -> int:
        return max(self.external, sum(entry.static for entry in self.members))

    def available(self) -> int:
        leased = sum(entry.leased for entry in self.members)
        return max(0, CAPACITY - self.headroom - self.non_kv() - leased)

    def draw(self, data: st.DataObject) -> ModelMember:
        return data.draw(st.sampled_from(self.members))

    def granted(self) -> None:
        leased = sum(entry.leased for entry in self.members)
        assert leased + self.non_kv() + self.headroom <= CAPACITY

    @rule(data=st.data(), static=st.integers(0, 200))
    def join(self, data: st.DataObject, static: int) -> None:
        ledger = data.draw(st.sampled_from(self.ledgers))
        taken = sum(entry.static for entry in self.members) + self.headroom
        if static and taken + static > CAPACITY:
            with pytest.raises(LedgerRefused, match="do not fit"):
                ledger.join("too much", static)
            return
        member = ledger.join(f"member {len(self.members)}", static)
        self.members.append(ModelMember(ledger, member, static))

    @precondition(lambda self: self.members)
    @rule(data=st.data(), amount=st.integers(0, CAPACITY + 100))
    def lease(self, data: st.DataObject, amount: int) -> None:
        entry = self.draw(data)
        fits = amount <= self.available()
        assert entry.member.lease(amount) == fits
        if fits:
            entry.leased += amount
            if amount:
                self.granted()

    @precondition(lambda self: self.members)
    @rule(data=st.data(), amount=st.integers(0, CAPACITY + 100), quantum=st.integers(1, 99))
    def lease_up_to(self, data: st.DataObject, amount: int, quantum: int) -> None:
        entry = self.draw(data)
        expected = min(amount, self.available()) // quantum * quantum
        assert entry.member.lease_up_to(amount, quantum) == expected
        entry.leased += expected
        if expected:
            self.granted()

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = self.draw(data)
        amount = data.draw(st.integers(0, entry.leased))
        entry.member.release(amount)
        entry.leased -= amount

    @precondition(lambda self: self.members)
    @rule(data=st.data(), excess=st.integers(1, 1000))
    def release_too_much(self, data: st.DataObject, excess: int) -> None:
        entry = self.draw(data)
        with pytest.raises(ValueError, match="nothing was released"):
            entry.member.release(entry.leased + excess)

    @precondition(lambda self: self.members)
    @rule(data=st.data(), static=st.integers(0, 300))
    def set_static(self, data: st.DataObject, static: int) -> None:
        entry = self.draw(data)
        entry.member.set_static(static)
        entry.static = static

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        entry = self.draw(data)
        delta = data.draw(st.integers(-entry.committed, 500))
        entry.member.add_committed(delta)
        entry.committed += delta
        with pytest.raises(VmmError, match="cannot change"):
            entry.member.add_committed(-entry.committed - 1)

    @rule(data=st.data(), used=st.integers(0, 1500))
    def set_device_used(self, data: st.DataObject, used: int) -> None:
        data.draw(st.sampled_from(self.ledgers)).set_device_used(used)
        self.external = max(0, used - sum(entry.committed for entry in self.members))

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        entry = self.draw(data)
        entry.member.leave()
        self.members.remove(entry)
        with pytest.raises(VmmError, match="has left"):
            entry.member.lease(0)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def kill_and_reap(self, data: st.DataObject) -> None:
        entry = self.draw(data)
        lose_lock(entry.ledger.path, entry.member)
        self.members.remove(entry)
        reaped = data.draw(st.sampled_from(self.ledgers)).reap()
        assert [(info.slot, info.leased, info.alive) for info in reaped] == [
            (entry.member.slot, entry.leased, False)
        ]

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def kill_and_lease(self, data: st.DataObject) -> None:
        """A lease that needs the bytes of the dead finds them by itself."""
        if len(self.members) < 2:
            return
        entry = self.draw(data)
        lose_lock(entry.ledger.path, entry.member)
        self.members.remove(entry)
        heir = self.draw(data)
        everything = self.available()
        assert heir.member.lease(everything)
        heir.leased += everything
        heir.ledger.reap()

    @invariant()
    def all_see_the_same(self) -> None:
        for ledger in getattr(self, "ledgers", []):
            assert ledger.available() == self.available()
            assert ledger.external == self.external
            assert ledger.total_leased() == sum(entry.leased for entry in self.members)
            seen = {info.slot: info for info in ledger.members()}
            assert seen.keys() == {entry.member.slot for entry in self.members}
            for entry in self.members:
                info = seen[entry.member.slot]
                assert info.alive
                assert info.generation == entry.member.generation
                assert (info.leased, info.committed, info.static_bytes) == (
                    entry.leased,
                    entry.committed,
                    entry.static,
                )


def descriptors(path: str) -> set[int]:
    """Descriptors this process has open on the file."""
    found = set()
    for name in Path("/proc/self/fd").iterdir():
        try:
            if str(name.readlink()) == path:
                found.add(int(name.name))
        except OSError:
            continue  # the descriptor that listed the directory
    return found


def lose_lock(path: str, member: Member) -> None:
    """What the kernel does when a member's process dies: its byte is no longer locked."""
    for fd in descriptors(path):
        set_lock(fd, fcntl.F_UNLCK, MEMBER_BYTES + member.slot)


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedgerModel = LedgerMachine.TestCase


# -- processes ------------------------------------------------------------------------------------

CHILD = """
import sys, time
from kvcached_core._core import Ledger
path, slot, generation, amount = sys.argv[1], *map(int, sys.argv[2:])
ledger = Ledger(path)
member = ledger.attach(slot, generation) if generation else ledger.join("child", 10)
assert member.lease(amount)
member.add_committed(amount // 2)
print(member.slot, member.generation, flush=True)
time.sleep(100)
"""


@contextmanager
def child(
    path: Path, amount: int, slot: int = -1, generation: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `amount` and sleeps; killed at the end."""
    arguments = [str(path), str(slot), str(generation), str(amount)]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip(), "the child failed to start"
        yield process
    finally:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_process_pays_back_when_somebody_needs_it(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("parent")
    with child(path, 700) as process:
        assert not member.lease(300)
        assert ledger.available() == CAPACITY - 710
        kill(process)
        assert [info.alive for info in ledger.members()] == [True, False]
        assert member.lease(CAPACITY)
    assert [info.name for info in ledger.members()] == ["parent"]


def test_reap_says_who_died(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    with child(path, 600) as process:
        assert ledger.reap() == []
        kill(process)
        (dead,) = ledger.reap()
    assert (dead.name, dead.pid, dead.leased, dead.committed) == ("child", process.pid, 600, 300)
    assert ledger.available() == CAPACITY


def test_a_stopped_process_is_not_dead(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    with child(path, 600) as process:
        process.send_signal(signal.SIGSTOP)
        assert ledger.reap() == []
        assert ledger.total_leased() == 600


def test_a_worker_keeps_its_member_alive(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    leader = ledger.join("engine")
    assert leader.lease(100)
    with child(path, 200, leader.slot, leader.generation) as process:
        assert leader.info().leased == 300
        leader.leave()
        assert ledger.total_leased() == 300
        kill(process)
        (dead,) = ledger.reap()
    assert dead.name == "engine"


def test_a_forked_child_is_told_to_open_its_own(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("parent")
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            for call in (lambda: member.lease(1), ledger.available, lambda: ledger.join("x")):
                with pytest.raises(VmmError, match="open it again in this process"):
                    call()
            del member
            assert Ledger(path).join("child").lease(1)
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(pid, 0)[1] == 0
    assert member.lease(CAPACITY)
    assert [info.name for info in ledger.members()] == ["parent"]


def test_waiting_for_another_process_lets_threads_run(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("parent")
    with path.open("r+b") as file:
        set_lock(file.fileno(), fcntl.F_WRLCK, MUTEX_BYTE)
        thread = threading.Thread(target=member.lease, args=(1,), daemon=True)
        thread.start()
        turns = 0
        end = time.monotonic() + 0.2
        while time.monotonic() < end:  # would stand still if the waiter kept the GIL
            turns += 1
            time.sleep(0)
        assert thread.is_alive()
        assert turns > 100
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert ledger.total_leased() == 1


def test_python_threads_share_a_member(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    members = [ledger.join("a"), Ledger(path).join("b")]
    errors: list[BaseException] = []

    def work(member: Member) -> None:
        try:
            for _ in range(300):
                if member.lease(400):
                    member.release(400)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(members[i % 2],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert ledger.total_leased() == 0


# -- numbers and names ----------------------------------------------------------------------------


def test_facts_about_a_ledger(path: Path) -> None:
    ledger = Ledger(path, CAPACITY, 10)
    assert (ledger.path, ledger.capacity, ledger.headroom) == (str(path), CAPACITY, 10)
    assert ledger.version == 2
    assert abs(ledger.create_time - time.time()) < 60
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_numbers_of_living_members_stand(path: Path) -> None:
    ledger = Ledger(path, CAPACITY, 10)
    member = ledger.join("m")
    with pytest.raises(VmmError, match="capacity of 1000 bytes, not 2000"):
        Ledger(path, 2000)
    with pytest.raises(VmmError, match="headroom of 10 bytes, not 20"):
        Ledger(path, CAPACITY, 20)
    assert Ledger(path).headroom == 10
    member.leave()
    assert Ledger(path, 2000, 20).available() == 1980


def test_demand_is_that_of_the_living_others(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    one, two = ledger.join("one"), ledger.join("two")
    one.set_demand(5)
    two.set_demand(7)
    assert ledger.total_demand() == 12
    assert ledger.total_demand(except_slot=one.slot) == 7
    lose_lock(ledger.path, two)
    assert ledger.total_demand() == 5


@pytest.mark.parametrize("name", ["", "x" * 96, "tab\t", "\u00fc"])
def test_names_are_plain(path: Path, name: str) -> None:
    with pytest.raises(VmmError, match="printable ASCII"):
        Ledger(path, CAPACITY).join(name)


@pytest.mark.parametrize("amount", [-1, 2**57, -(2**63)])
def test_amounts_are_checked(path: Path, amount: int) -> None:
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("m")
    calls: list[Callable[[int], object]] = [member.lease, member.set_parked, member.set_cached]
    calls += [
        member.set_static,
        member.set_demand,
        ledger.set_device_used,
        lambda n: ledger.join("x", n),
    ]
    for call in calls:
        with pytest.raises(VmmError):
            call(amount)
    with pytest.raises(ValueError):
        member.release(amount)
    with pytest.raises(VmmError, match="quantum"):
        member.lease_up_to(1, 0)


def test_all_slots_taken(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    members = [ledger.join(f"m{i}") for i in range(64)]
    with pytest.raises(VmmError, match="64 slots"):
        ledger.join("one more")
    members[5].leave()
    assert ledger.join("one more").slot == 5


# -- files that are not as they should be ---------------------------------------------------------


def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    Ledger(path, CAPACITY)
    target = path.rename(path.with_name("target"))
    path.symlink_to(target)
    with pytest.raises(VmmError, match="symbolic link"):
        Ledger(path, CAPACITY)
    (tmp_path / "link").symlink_to(path.parent)
    with pytest.raises(VmmError, match="symbolic link"):
        Ledger(tmp_path / "link" / "target", CAPACITY)


def test_wrong_modes_are_refused(path: Path) -> None:
    Ledger(path, CAPACITY)
    path.chmod(0o644)
    with pytest.raises(VmmError, match="chmod 600"):
        Ledger(path, CAPACITY)
    path.parent.chmod(0o750)
    with pytest.raises(VmmError, match="chmod 700"):
        Ledger(path, CAPACITY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_owner_is_refused(path: Path) -> None:
    Ledger(path, CAPACITY)
    os.chown(path, 12345, 12345)
    with pytest.raises(VmmError, match="belongs to user 12345"):
        Ledger(path, CAPACITY)


def test_what_is_not_a_file_is_refused(path: Path) -> None:
    path.parent.mkdir(0o700)
    os.mkfifo(path)
    with pytest.raises(VmmError, match="not a regular file"):
        Ledger(path, CAPACITY)
    with pytest.raises(VmmError, match="start an engine first"):
        Ledger(path.with_name("missing"))
    with pytest.raises(VmmError, match="No such file"):
        Ledger(path.parent / "missing" / "deeper" / "ledger", CAPACITY)


def test_a_truncated_file_is_refused(path: Path) -> None:
    Ledger(path, CAPACITY)
    os.truncate(path, FILE_BYTES - 1)
    with pytest.raises(VmmError, match="damaged"):
        Ledger(path, CAPACITY)


def test_garbage_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir(0o700)
    path.touch(0o600)
    path.write_bytes(b"my only copy")
    with pytest.raises(VmmError, match="is not a ledger"):
        Ledger(path, CAPACITY)
    assert path.read_bytes() == b"my only copy"


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_an_older_version_is_rebuilt_only_when_unused(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("old")
    patch(path, 8, struct.pack("<I", 1))
    with pytest.raises(VmmError, match="use one release for all"):
        Ledger(path, CAPACITY)
    with pytest.raises(VmmError, match="restart this process"):
        member.lease(1)
    del member
    assert Ledger(path, CAPACITY).version == 2


def test_absurd_values_are_an_error_for_the_living(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    one, two = ledger.join("one"), ledger.join("two")
    patch(path, 4096 + SLOT_BYTES * two.slot + 8, struct.pack("<Q", 2**64 - 1))
    for call in (lambda: one.lease(1), ledger.available, ledger.total_leased):
        with pytest.raises(VmmError, match=r"slot 1 claims.*delete it"):
            call()
    two.leave()
    assert one.lease(1)


def test_a_replaced_file_is_noticed(path: Path) -> None:
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("m")
    path.unlink()
    Ledger(path, CAPACITY)
    for call in (ledger.reap, lambda: ledger.join("late")):
        with pytest.raises(VmmError, match="restart every engine"):
            call()
    assert member.lease(CAPACITY)


def use_everything(path: Path, capacity: int | None) -> None:
    """Call all there is; only VmmError may come out."""
    ledger = Ledger(path, capacity)
    ledger.members()
    member = ledger.join("m")
    ledger.set_device_used(10)
    ledger.available()
    ledger.total_demand()
    if member.lease(10):
        member.release(10)
    member.claimable()
    member.set_demand(10)
    member.ask()
    member.policy()
    member.info()
    ledger.events()
    ledger.overdraft()
    ledger.reap()


PATCHES = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 127),
            st.integers(4096, 4096 + 1200),
            st.integers(FILE_BYTES - 256 * 256, FILE_BYTES - 255 * 256),
        ),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8])),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("in_use", [False, True])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(patches=PATCHES, capacity=st.sampled_from([None, CAPACITY, 77]))
@example(patches=[(64, b"\0" * 8)], capacity=None)
@example(patches=[(88, b"\xff" * 8)], capacity=CAPACITY)
def test_any_bytes_are_used_or_refused(
    tmp_path: Path, in_use: bool, patches: list[tuple[int, bytes]], capacity: int | None
) -> None:
    path = tmp_path / "ledger"
    path.unlink(missing_ok=True)
    ledger = Ledger(path, CAPACITY)
    member = ledger.join("resident") if in_use else None
    for offset, data in patches:
        patch(path, offset, data)
    for call in (
        lambda: use_everything(path, capacity),
        lambda: ledger.set_device_used(5),
        lambda: member and member.lease(5),
        lambda: member and member.info(),
        lambda: member.leave() if member else None,
    ):
        try:
            call()
        except VmmError as error:
            assert str(error)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=300), size=st.integers(0, FILE_BYTES + 5000))
def test_any_file_is_used_or_refused(tmp_path: Path, content: bytes, size: int) -> None:
    path = tmp_path / "ledger"
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_bytes(content)
    os.truncate(path, size)
    before = path.read_bytes()
    if any(before[:4096]):
        with pytest.raises(VmmError, match="is not a ledger"):
            Ledger(path, CAPACITY)
        assert path.read_bytes() == before
    else:
        use_everything(path, CAPACITY)
