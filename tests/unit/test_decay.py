# SPDX-License-Identifier: Apache-2.0
"""Freed pages age by the low-water mark of a whole period."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.decay import LowWater


def test_pages_unused_for_a_period_have_aged() -> None:
    decay = LowWater(2.0)
    assert decay.observe(10, 0.0) == 0
    assert decay.observe(10, 1.9) == 0
    assert not decay.is_due(1.9)
    assert decay.is_due(2.0)
    assert decay.observe(10, 2.0) == 10


def test_pages_needed_in_between_have_not() -> None:
    decay = LowWater(2.0)
    decay.observe(10, 0.0)
    decay.observe(3, 1.0)
    assert decay.observe(10, 2.0) == 3


def test_a_new_period_starts_from_what_is_there() -> None:
    decay = LowWater(1.0)
    decay.observe(5, 0.0)
    decay.observe(5, 1.0)
    assert decay.observe(2, 2.5) == 2


@given(st.lists(st.tuples(st.floats(0.01, 0.5), st.integers(0, 100)), min_size=1))
def test_what_aged_is_the_least_seen_in_the_period(
    steps: list[tuple[float, int]],
) -> None:
    decay = LowWater(1.0)
    now, since = 0.0, []
    for step, unused in steps:
        now += step
        ended = decay.is_due(now)
        since.append(unused)
        assert decay.observe(unused, now) == (min(since) if ended else 0)
        if ended:
            since = [unused]
