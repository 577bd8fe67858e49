# SPDX-License-Identifier: Apache-2.0
"""What the serving benchmarks compute of memory, of closed loops and of numbers of engines."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the benchmarks' client, which engines bring")
pytest.importorskip("numpy", reason="the benchmarks' percentiles")

from benchmarks.serving import closed_loop, density, patterns
from benchmarks.serving.client import Run, Sent
from benchmarks.serving.closed_loop import ClosedCell, measured, steady_window
from benchmarks.serving.footprint import Paging, footprint, live_tokens, quiet_moment
from benchmarks.serving.observe import Held, Timeline, exposed
from benchmarks.serving.patterns import Arrival


def sent(first: float, last: float, tokens: int, phase: str = "flat") -> Sent:
    return Sent(phase, 0.0, 0.0, first, last, tokens)


def phases(arrivals: list[Arrival], phase: str) -> list[float]:
    return [arrival.at for arrival in arrivals if arrival.phase == phase]


# -- requests at a time ---------------------------------------------------------------------------


def test_cells_of_a_closed_loop() -> None:
    cell = ClosedCell.parse("8x1024x128")
    assert (cell.concurrency, cell.prompt, cell.output, cell.requests) == (8, 1024, 128, 24)
    assert ClosedCell.parse("1x16x16").requests == 8
    assert ClosedCell.parse("1x16x16:5").requests == 5
    assert cell.pattern().longest == 1152
    for text in ("8x10", "8x10x", "axbxc", "0x10x10", "1x10x1", "1x10x10:0"):
        with pytest.raises(ValueError, match=repr(text)[1:-1]):
            ClosedCell.parse(text)


def timeline(*rows: tuple[float, int, int]) -> Timeline:
    """Time, commits and decommits of one member."""
    return Timeline([(t, 0, {"a": Held(0, 0, 0, up, down)}) for t, up, down in rows])


def test_steady_is_between_the_first_wave_and_the_last() -> None:
    cell = ClosedCell.parse("2x10x10:6")
    rows = [sent(0.1, end, 10) for end in (1, 1.5, 2, 2.5, 3, 3.5)]
    assert steady_window(cell, rows) == (1.5, 3)
    assert steady_window(cell, rows[:4]) is None
    run = Run(rows, [])
    found = measured(
        cell, run, timeline((0, 0, 0), (1.4, 9, 0), (2.9, 9, 0), (3.2, 9, 4), (9, 9, 9))
    )
    assert found["steady"] == {"seconds": 1.5, "commits": 0, "decommits": 0}
    assert found["driver"] == {"commits": 9, "decommits": 9}
    assert "steady" not in measured(cell, run, Timeline([(0.0, 5, {})]))


def test_systems_are_compared_cell_by_cell() -> None:
    def one(system: str, rate: float, ttft: float) -> dict[str, Any]:
        return {
            "system": system, "cell": "1x1x2", "failed": 0, "preemptions": 0, "out_tok_s": rate,
            "each_ttft_ms": [ttft] * 4, "each_tpot_ms": [10.0] * 4,
            "steady": {"seconds": 2.0, "commits": 1, "decommits": 0},
        }  # fmt: skip

    rows = [one("elastic", 99, 20), one("static", 100, 10), one("static", 110, 30), {"error": "x"}]
    base, other = closed_loop.compare(rows, "static")
    assert (base["system"], base["rounds"], base["values"]["tok/s"]) == ("static", 2, 105)
    assert base["spread"] == pytest.approx(0.1)
    assert other["ratios"]["tok/s"] == pytest.approx(99 / 105)
    assert other["ratios"]["ttft p50"] == 1.0
    assert base["steady"] == {"seconds": 4.0, "commits": 2, "decommits": 0}
    assert "99.00 (0.943)" in closed_loop.table(rows, "static")


# -- memory ---------------------------------------------------------------------------------------


def test_the_state_at_a_moment_is_the_last_one_seen() -> None:
    line = timeline((1, 1, 0), (2, 5, 0), (3, 7, 2))
    assert [line.at(t)["a"].commits for t in (0, 1, 2.5, 9)] == [1, 1, 5, 7]
    assert [row[0] for row in line.since(1).rows] == [0, 1, 2]
    record = line.as_json()
    assert record["names"] == ["a"]
    assert record["rows"][1] == [2, 0, [0, 0, 0, 5, 0]]


def test_the_packed_floor() -> None:
    paging = Paging(token_bytes=1024, page_bytes=65536)  # 4 blocks a page
    assert paging.packed([]) == 65536  # the null block
    assert paging.packed([1, 16, 16]) == 65536
    assert paging.packed([17, 16]) == 65536
    assert paging.packed([17, 17]) == 2 * 65536


def test_the_footprint_of_a_tail() -> None:
    arrivals = [Arrival(0, 100, 11, "short"), Arrival(0, 100, 101, "tail")]
    rows = [sent(1, 2, 11, "short"), sent(1, 11, 101, "tail")]
    assert quiet_moment(rows, 4) == (6, 4)
    assert quiet_moment(rows, 9) == pytest.approx((9.2, 7.2))  # the tail is shorter
    assert quiet_moment(rows[:1], 4) is None
    assert live_tokens(arrivals, rows, 0.5) == []
    assert live_tokens(arrivals, rows, 1.5) == [106, 106]
    assert live_tokens(arrivals, rows, 6) == [151]
    paging = Paging(token_bytes=1024, page_bytes=16384)  # a block a page
    found = footprint(arrivals, rows, Held(22 * 16384, 3 * 16384, 8 * 16384, 0, 0), paging, 6)
    assert (found["live_requests"], found["live_tokens"]) == (1, 151)
    assert found["packed_mib"] * 1024 == 11 * 16
    assert (found["ratio"], found["ratio_in_use"]) == (2, 1)


def test_how_much_of_mapping_is_hidden() -> None:
    growth = {
        "counters": {"commits": 40},
        "times": {
            "step": {"count": 10, "sum_s": 0.001, "p99_ms_at_most": 0.16},
            "map": {"count": 5, "sum_s": 0.010, "p99_ms_at_most": 5.12},
        },
    }
    found = exposed(growth)
    assert (found["hidden_share"], found["step_p99_ms_at_most"], found["pages"]) == (0.9, 0.16, 40)
    assert exposed({"counters": {"commits": 0}, "times": {}})["hidden_share"] is None


# -- more patterns, and how many engines ----------------------------------------------------------


def test_bursts_come_to_each_model_at_its_own_times() -> None:
    pattern = patterns.parse("burst:5", 4)
    assert [len(arrivals) for arrivals in pattern.models] == [3 * 3 * 5] * 4
    assert len({arrivals[0].at for arrivals in pattern.models}) > 1
    assert patterns.parse("burst:5", 4).models == pattern.models


def test_a_tail_outlives_the_rest() -> None:
    (arrivals,) = patterns.parse("tail:64", 1).models
    tail = [arrival.output for arrival in arrivals if arrival.phase == "tail"]
    short = [arrival.output for arrival in arrivals if arrival.phase == "short"]
    assert (len(tail), len(short)) == (4, 60)
    assert min(tail) > 2 * max(short) >= 2
    assert max(arrival.at for arrival in arrivals) < 2


def test_growth_is_of_one_model() -> None:
    pattern = patterns.parse("grow:7", 2)
    assert [a.prompt for a in pattern.models[0]] == [6144] * 7
    assert phases(pattern.models[1], "rest") == list(range(10))
    assert patterns.parse("grow:7", 1).longest == 6144 + 256


def test_most_engines_that_meet_an_objective() -> None:
    def one(engines: int, p99: float, failed: int = 0) -> dict[str, Any]:
        part = {"requests": 9, "failed": failed, "ttft_ms": {"mean": p99 / 2, "p99": p99}}
        return {
            "system": "elastic", "pattern": "burst:4", "engines": engines, "shape": "1b",
            "phases": {"burst": part}, "dead": [], "start_s": {"a": 9.0, "b": 12.0},
            "preemptions": 0, "memory_ready_mib": 5, "memory_mib": {"peak": 7},
        }  # fmt: skip

    cells = [one(2, 100), one(4, 400), one(6, 900), one(3, 100, failed=1)]
    cells.append({"system": "elastic", "pattern": "burst:4", "engines": 8, "error": "no room",
                  "shape": "1b"})  # fmt: skip
    late = {"system": "elastic", "pattern": "burst:4", "engines": 5, "error": "not run: late"}
    cells.append(late | {"shape": "1b"})
    (found,) = density.summary(cells, 500)
    assert (found["most"], found["first_not"]) == (4, 6)
    text = density.table(cells, 500)
    assert "4 engines meet a p99 of 500 ms, 6 do not" in text
    assert "no room" in text
