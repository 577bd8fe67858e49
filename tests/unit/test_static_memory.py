# SPDX-License-Identifier: Apache-2.0
"""What an engine holds beside its KV cache, as the ledger learns of it."""

from __future__ import annotations

import pytest

from kvcached_core import static_memory
from kvcached_core.static_memory import StaticMemory

GIB = 1 << 30


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(static_memory.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("process", "beside"),
    [(19 * GIB, GIB), (None, 512 << 20), (10 * GIB, 0)],
    ids=["told", "not told", "nonsense"],
)
def test_the_larger_of_planned_and_held(
    clock: list[float], process: int | None, beside: int
) -> None:
    reserved, told = [14 * GIB], []
    static = StaticMemory(16 * GIB, lambda: reserved[0], lambda: process, told.append)
    static.refresh(committed=4 * GIB)
    assert told[-1:] == ([16 * GIB + beside] if beside else [])
    reserved[0] = 18 * GIB
    static.refresh(committed=0)  # too soon
    assert told[-1:] == ([16 * GIB + beside] if beside else [])
    clock[0] += 1
    static.refresh(committed=0)
    assert told[-1] == 18 * GIB + beside
    count = len(told)
    clock[0] += 1
    static.refresh(committed=9 * GIB)
    assert len(told) == count  # nothing new


@pytest.mark.parametrize(
    ("grown", "kept"), [(3 * GIB, 2 * GIB), (GIB, GIB), (0, 0)], ids=["more", "less", "nothing"]
)
def test_what_was_reckoned_for_graphs_is_theirs_or_a_neighbours(
    clock: list[float], grown: int, kept: int
) -> None:
    reserved, told = [12 * GIB], []
    static = StaticMemory(
        18 * GIB, lambda: reserved[0], lambda: reserved[0], told.append, graphs=2 * GIB
    )
    reserved[0] += grown
    static.refresh(committed=0)
    assert (told or [18 * GIB])[-1] == 16 * GIB + kept


@pytest.mark.parametrize("first_asleep", [False, True], ids=["stepped before", "never stepped"])
def test_what_is_away_is_not_held(clock: list[float], first_asleep: bool) -> None:
    """The ledger is told by others; what is told from here agrees with them."""
    process, told = [19 * GIB], []
    static = StaticMemory(14 * GIB, lambda: 16 * GIB, lambda: process[0], told.append)
    ledger = 14 * GIB
    if not first_asleep:
        static.refresh(committed=GIB)
        ledger = told.pop()
    static.set_away(10 * GIB)
    process[0], ledger = process[0] - 10 * GIB, ledger - 10 * GIB
    clock[0] += 1
    static.refresh(committed=GIB)
    ledger = told.pop() if told else ledger
    assert ledger == (16 + 2 - 10) * GIB
    static.set_away(0)
    process[0], ledger = process[0] + 10 * GIB, ledger + 10 * GIB
    clock[0] += 1
    static.refresh(committed=GIB)
    assert not told and ledger == 18 * GIB


def test_what_computing_takes_is_spare_in_a_sleep(clock: list[float]) -> None:
    """Weights of 10 GiB, 4 GiB registered for activations, of which the allocator kept 2 + 3."""
    reserved, process, told = [15 * GIB], [16 * GIB], []

    def empty() -> None:
        process[0] -= reserved[0] - 10 * GIB
        reserved[0] = 10 * GIB

    static = StaticMemory(
        14 * GIB, lambda: reserved[0], lambda: process[0], told.append, empty=empty
    )
    static.refresh(committed=0)
    assert told.pop() == 16 * GIB
    assert static.spare(committed=0) == 4 * GIB
    assert told.pop() == 15 * GIB  # what was kept beyond the plan is told from here
    static.set_away(10 * GIB + 4 * GIB)
    clock[0] += 1
    static.refresh(committed=0)
    assert not told, "others told the rest: it holds its context"
