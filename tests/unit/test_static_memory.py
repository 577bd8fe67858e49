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
