# SPDX-License-Identifier: Apache-2.0
"""How the allocator's benchmark reads what its programs and callgrind say."""

from __future__ import annotations

from pathlib import Path

from benchmarks import alloc_microbench as bench

DUMP = """# callgrind format
version: 1
pid: 7
part: 2
desc: Trigger: Client Request: take half 4
events: Ir
totals: 1230
"""


def test_counts_are_by_name(tmp_path: Path) -> None:
    (tmp_path / "callgrind.out.7.2").write_text(DUMP)
    (tmp_path / "callgrind.out.7").write_text(DUMP.replace("Client Request: take half 4", "Exit"))
    assert bench.counts(tmp_path) == {"take half 4": 1230}


def test_times_are_less_what_the_clock_takes() -> None:
    printed = (
        'noise\n{"name": "nothing", "calls": 3, "median_s": 2e-8}\n'
        '{"name": "take half 4", "calls": 3, "median_s": 12e-8}\n'
        '{"name": "take half 1", "calls": 3, "median_s": 1e-8}\n'
    )
    found = bench.joined(bench.rows(printed), {"take half 4": {"instructions": 12.0}})
    assert set(found) == {"take half 4", "take half 1"}
    assert round(found["take half 4"]["median_s"] * 1e8) == 10
    assert found["take half 4"]["instructions"] == 12.0
    assert found["take half 1"]["median_s"] == 0


def test_the_table_leaves_out_what_was_not_measured() -> None:
    row = {"instructions": 1234.0, "median_s": 5e-7}
    text = bench.table({"cpp": {"take mapped 1": row, "lease 1": row}, "public_error": "no torch"})
    assert "| 1 | 1,234 / 0.50 | - |" in text
    assert "public kvcached" not in text
    assert "1 member(s), one active: lease 1,234 / 0.50, release -" in text
