# SPDX-License-Identifier: Apache-2.0
"""How many engines fit and meet an objective, from cells of runs with different numbers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.serving.report import main_phase


def meets(cell: dict[str, Any], objective_ms: float) -> bool:
    """Whether all requests were answered and 99 % of first tokens came in time."""
    if "error" in cell or cell["dead"]:
        return False
    own = cell["phases"][main_phase(cell)]
    times = own["ttft_ms"]
    return own["failed"] == 0 and times is not None and times["p99"] <= objective_ms


def summary(cells: Sequence[dict[str, Any]], objective_ms: float) -> list[dict[str, Any]]:
    """For each shape, system and pattern: the most engines that did, and the first that did not."""
    found = []
    # Where the time was up, nothing is known.
    cells = [c for c in cells if not c.get("error", "").startswith("not run")]
    keys = dict.fromkeys((c.get("shape", ""), c["system"], c["pattern"]) for c in cells)
    for shape, system, pattern in keys:
        same = [
            c for c in cells
            if (c.get("shape", ""), c["system"], c["pattern"]) == (shape, system, pattern)
        ]  # fmt: skip
        good = [c["engines"] for c in same if meets(c, objective_ms)]
        bad = [c["engines"] for c in same if not meets(c, objective_ms)]
        found.append({
            "shape": shape,
            "system": system,
            "pattern": pattern,
            "most": max(good, default=0),
            "first_not": min((n for n in bad if n > max(good, default=0)), default=None),
        })  # fmt: skip
    return found


def table(cells: Sequence[dict[str, Any]], objective_ms: float) -> str:
    """Markdown: a line for every cell, then the summary."""
    lines = [
        "| shape | system | pattern | engines | TTFT mean | p99 | in time | failed "
        "| preempted | start of the last s | MiB ready | peak |",
        "|---" * 12 + "|",
    ]
    for cell in sorted(cells, key=lambda c: (c.get("shape", ""), c["system"], c["engines"])):
        head = [cell.get("shape", ""), cell["system"], cell["pattern"], str(cell["engines"])]
        if "error" in cell:
            reason = " ".join(cell["error"].split())[:100].replace("|", "/")
            lines.append(f"| {' | '.join(head)} | {reason} |" + " |" * 7)
            continue
        own = cell["phases"][main_phase(cell)]
        times = own["ttft_ms"] or {}
        starts = list(cell["start_s"].values())
        parts = [
            *head,
            f"{times.get('mean', float('nan')):.0f}",
            f"{times.get('p99', float('nan')):.0f}",
            "yes" if meets(cell, objective_ms) else "no",
            f"{own['failed']}/{own['requests']}",
            str(cell["preemptions"]),
            f"{starts[-1]:.0f}" if starts else "-",
            str(cell["memory_ready_mib"]),
            str(cell["memory_mib"]["peak"]),
        ]
        lines.append(f"| {' | '.join(parts)} |")
    lines.append("")
    for row in summary(cells, objective_ms):
        beyond = "" if row["first_not"] is None else f", {row['first_not']} do not"
        lines.append(
            f"{row['shape']} {row['system']} {row['pattern']}: {row['most']} engines meet a p99 of "
            f"{objective_ms:.0f} ms{beyond}"
        )
    return "\n".join(lines)
