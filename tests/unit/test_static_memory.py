# SPDX-License-Identifier: Apache-2.0
"""What an engine holds beside its KV cache, as the ledger learns of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcached_core import static_memory
from kvcached_core.static_memory import StaticMemory

GIB = 1 << 30


def follow(
    registered: int,
    reserved: Callable[[], int],
    process: Callable[[], int | None],
    publish: Callable[[int], object],
    to_come: Callable[[int], object] = lambda num_bytes: None,
    guessed: Callable[[int], object] = lambda num_bytes: None,
    graphs: int = 0,
    empty: Callable[[], object] = lambda: None,
) -> StaticMemory:
    return StaticMemory(registered, reserved, process, publish, to_come, guessed, graphs, empty)


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
    static = follow(16 * GIB, lambda: reserved[0], lambda: process, told.append)
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
    static = follow(18 * GIB, lambda: reserved[0], lambda: reserved[0], told.append, graphs=2 * GIB)
    reserved[0] += grown
    static.refresh(committed=0)
    assert (told or [18 * GIB])[-1] == 16 * GIB + kept


@pytest.mark.parametrize("first_asleep", [False, True], ids=["stepped before", "never stepped"])
def test_what_is_away_is_not_held(clock: list[float], first_asleep: bool) -> None:
    """The ledger is told by others; what is told from here agrees with them."""
    process, told = [19 * GIB], []
    static = follow(14 * GIB, lambda: 16 * GIB, lambda: process[0], told.append)
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

    static = follow(14 * GIB, lambda: reserved[0], lambda: process[0], told.append, empty=empty)
    static.refresh(committed=0)
    assert told.pop() == 16 * GIB
    assert static.spare(committed=0) == 4 * GIB
    assert told.pop() == 15 * GIB  # what was kept beyond the plan is told from here
    static.set_away(10 * GIB + 4 * GIB)
    clock[0] += 1
    static.refresh(committed=0)
    assert not told, "others told the rest: it holds its context"


def test_what_is_to_come_is_told_until_it_has(clock: list[float]) -> None:
    """16 GiB registered, 2 of them for graphs; the allocator grows to them, and beyond."""
    reserved, held, to_come = [11 * GIB], [], []
    static = follow(
        16 * GIB,
        lambda: reserved[0],
        lambda: reserved[0],
        held.append,
        to_come=to_come.append,
        graphs=2 * GIB,
    )
    assert to_come == [5 * GIB], "from the start, not from the first step on"
    for now, left in ((13, 3), (15, 1), (17, 0)):
        clock[0] += 1
        reserved[0] = now * GIB
        static.refresh(committed=0)
        assert to_come[-1] == left * GIB
    clock[0] += 1
    static.refresh(committed=0)
    assert to_come == [left * GIB for left in (5, 3, 1, 0)], "once each"
    assert held == [17 * GIB]


def test_nothing_is_to_come_to_who_sleeps(clock: list[float]) -> None:
    reserved, to_come = [15 * GIB], []

    def empty() -> None:
        reserved[0] = 10 * GIB

    static = follow(
        14 * GIB,
        lambda: reserved[0],
        lambda: reserved[0],
        lambda num_bytes: None,
        to_come=to_come.append,
        empty=empty,
    )
    static.refresh(committed=0)
    static.set_away(10 * GIB + static.spare(committed=0))
    assert to_come[-1] == 0
    clock[0] += 1
    static.refresh(committed=0)
    assert to_come[-1] == 0
    static.set_away(0)  # what came back was leased
    assert to_come[-1] == 0
    clock[0] += 1
    static.refresh(committed=0)
    assert to_come[-1] == 4 * GIB


@pytest.mark.parametrize("told", [True, False])
def test_a_context_nobody_told_of_is_a_guess(clock: list[float], told: bool) -> None:
    guessed: list[int] = []
    process = 15 * GIB if told else None
    static = follow(
        14 * GIB,
        lambda: 14 * GIB,
        lambda: process,
        lambda num_bytes: None,
        guessed=guessed.append,
    )
    static.refresh(committed=0)
    assert guessed == ([] if told else [512 << 20])
