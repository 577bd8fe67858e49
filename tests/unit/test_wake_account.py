# SPDX-License-Identifier: Apache-2.0
"""What a ledger promises while weights come and go, against a device that knows the truth."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core._core import Ledger, Member
from kvcached_core.sleep.wake_lease import WakeLease, WakeRefused

CAPACITY = 100
ENGINES = 4
WEIGHTS = 20
CONTEXT = 2
"""What an asleep engine has on the device; registered or not."""


class Engine:
    def __init__(self, member: Member) -> None:
        self.member = member
        self.mapped = 0
        self.pages = 0
        self.lease: WakeLease | None = None
        self.awake = False

    @property
    def promised(self) -> int:
        """Bytes it may still map."""
        return self.lease.num_bytes - self.mapped if self.lease is not None else 0


class Account(RuleBasedStateMachine):
    """Engines sleep and wake; whoever looks at the driver may be late with what he saw."""

    engines: list[Engine]

    @initialize(registered=st.integers(0, CONTEXT), foreign=st.integers(0, 40))
    def start(self, registered: int, foreign: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self._folder.name) / "gpu.ledger", CAPACITY, 0)
        self.foreign = foreign
        self.engines = [Engine(self.ledger.join(f"engine{i}", registered)) for i in range(ENGINES)]
        self.seen: list[tuple[int, int]] = []
        self.tell()

    def teardown(self) -> None:
        if hasattr(self, "engines"):
            for engine in self.engines:
                if engine.lease is not None:
                    engine.lease.close()
                engine.member.leave()
            self._folder.cleanup()

    @property
    def used(self) -> int:
        return self.foreign + sum(CONTEXT + e.mapped + e.pages for e in self.engines)

    def _pick(self, data: st.DataObject, *, waking: bool) -> Engine | None:
        found = [e for e in self.engines if (e.lease is not None) == waking]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        engine = self._pick(data, waking=False)
        if engine is None or engine.awake:
            return
        lease = WakeLease(self.ledger, engine.member, WEIGHTS)
        try:
            lease.wait(0.0, lambda: None)
        except WakeRefused:
            lease.close()
        else:
            engine.lease = lease

    @rule(data=st.data(), num_bytes=st.integers(1, WEIGHTS))
    def map_weights(self, data: st.DataObject, num_bytes: int) -> None:
        if (engine := self._pick(data, waking=True)) is not None:
            engine.mapped += min(num_bytes, engine.promised)

    @rule(data=st.data())
    def woken(self, data: st.DataObject) -> None:
        if (engine := self._pick(data, waking=True)) is not None:
            assert engine.lease is not None
            engine.mapped = WEIGHTS
            engine.lease.hand_over(WEIGHTS)
            engine.lease.close()
            engine.lease, engine.awake = None, True

    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        if (engine := self._pick(data, waking=True)) is not None:
            assert engine.lease is not None
            engine.mapped = 0
            engine.lease.close()
            engine.lease = None

    @rule(data=st.data())
    def sleep(self, data: st.DataObject) -> None:
        engine = self._pick(data, waking=False)
        if engine is not None and engine.awake:
            engine.mapped, engine.awake = 0, False
            engine.member.add_static(-WEIGHTS)

    @rule(data=st.data(), num_bytes=st.integers(1, 10))
    def grow(self, data: st.DataObject, num_bytes: int) -> None:
        engine = data.draw(st.sampled_from(self.engines))
        if engine.member.lease(num_bytes):
            engine.pages += num_bytes
            engine.member.add_committed(num_bytes)

    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(self.engines))
        if engine.pages:
            engine.member.add_committed(-engine.pages)
            engine.member.release(engine.pages)
            engine.pages = 0

    @rule()
    def look(self) -> None:
        self.seen.append((self.used, self.ledger.reading()))

    @rule()
    def tell(self) -> None:
        self.ledger.set_device_used(self.used, self.ledger.reading())

    @precondition(lambda self: bool(self.seen))
    @rule()
    def tell_late(self) -> None:
        used, reading = self.seen.pop(0)
        # Pages that came meanwhile are what headroom is for, and not this test's subject.
        self.ledger.set_device_used(used + sum(e.pages for e in self.engines), reading)

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        if hasattr(self, "engines"):
            free = CAPACITY - self.used - sum(e.promised for e in self.engines)
            assert free >= 0
            assert self.ledger.available() <= free

    @rule()
    def at_rest_it_is_exact(self) -> None:
        if all(e.lease is None for e in self.engines):
            self.ledger.set_device_used(self.used, self.ledger.reading())
            assert self.ledger.available() == CAPACITY - self.used


TestAccount = Account.TestCase


def test_a_wake_beside_foreign_memory_promises_nothing_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "gpu.ledger", 100, 0)
    first, second = (ledger.join(name) for name in ("first", "second"))
    ledger.set_device_used(50)  # by nobody the ledger knows
    lease = WakeLease(ledger, first, 30)
    lease.wait(0.0, lambda: None)
    ledger.set_device_used(50)  # nothing is mapped yet
    assert ledger.available() == 20
    late = ledger.reading()
    ledger.set_device_used(65)
    assert ledger.available() == 20
    lease.hand_over(30)
    lease.close()
    assert ledger.available() == 20
    ledger.set_device_used(50, late)
    assert ledger.available() == 20
    with pytest.raises(WakeRefused):
        WakeLease(ledger, second, 30).wait(0.0, lambda: None)
    ledger.set_device_used(80, ledger.reading())
    assert ledger.available() == 20
