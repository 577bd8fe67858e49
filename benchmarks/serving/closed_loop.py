# SPDX-License-Identifier: Apache-2.0
"""Cells with a fixed number of requests at a time, and their comparison between systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving import stats
from benchmarks.serving.client import Run, Sent
from benchmarks.serving.observe import Timeline
from benchmarks.serving.patterns import Arrival, Pattern

_LEAST = 8
_WAVES = 3


@dataclass(frozen=True)
class ClosedCell:
    """As one request ends the next is sent."""

    text: str
    concurrency: int
    prompt: int
    output: int
    requests: int

    @classmethod
    def parse(cls, text: str) -> ClosedCell:
        """Reads `CONCURRENCYxTOKENS_INxTOKENS_OUT[:REQUESTS]`.

        Raises:
            ValueError: it is none.
        """
        shape, _, count = text.partition(":")
        try:
            concurrency, prompt, output = (int(part) for part in shape.split("x"))
            requests = int(count) if count else max(_WAVES * concurrency, _LEAST)
        except ValueError:
            raise ValueError(f"{text!r} is no cell: write e.g. 8x1024x128:64") from None
        if min(concurrency, prompt, requests) < 1 or output < 2:
            raise ValueError(f"{text!r} has no requests, or answers without a second token")
        return cls(text, concurrency, prompt, output, requests)

    def pattern(self) -> Pattern:
        """All requests, each due at once."""
        arrivals = [Arrival(0.0, self.prompt, self.output, "flat") for _ in range(self.requests)]
        return Pattern(self.text, [arrivals])


def steady_window(cell: ClosedCell, rows: Sequence[Sent]) -> tuple[float, float] | None:
    """Between the end of the first wave and the first answer of the last one that ends.

    All the time as many requests run as may; before it memory grows, after it falls.
    """
    ends = sorted(row.last for row in rows if not row.error)
    if len(ends) < 2 * cell.concurrency + 1:
        return None
    begin, end = ends[cell.concurrency - 1], ends[-cell.concurrency]
    return (begin, end) if end > begin else None


def driver_calls(timeline: Timeline, begin: float, end: float) -> dict[str, int]:
    """Pages mapped and unmapped by all members between two moments."""
    before, after = timeline.at(begin), timeline.at(end)
    return {
        kind: sum(getattr(held, kind) - getattr(before[name], kind, 0)
                  for name, held in after.items() if name in before)
        for kind in ("commits", "decommits")
    }  # fmt: skip


def measured(cell: ClosedCell, run: Run, timeline: Timeline) -> dict[str, Any]:
    """One round."""
    found: dict[str, Any] = stats.requests(run.rows)
    good = [row for row in run.rows if not row.error]
    found["out_tok_s"] = round(stats.output_rate([run]), 2)
    found["seconds"] = round(max((row.last for row in good), default=0.0), 2)
    found["each_ttft_ms"] = [round(stats.ttft(row), 3) for row in good]
    found["each_tpot_ms"] = [round(stats.tpot(row), 4) for row in good]
    if timeline.rows and timeline.rows[0][2]:
        last = timeline.rows[-1][0]
        found["driver"] = driver_calls(timeline, timeline.rows[0][0], last)
        window = steady_window(cell, run.rows)
        if window is not None:
            found["steady"] = {
                "seconds": round(window[1] - window[0], 2),
                **driver_calls(timeline, *window),
            }
    return found


def pooled(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """All rounds of a cell and system as one: rates on average, times over all requests."""
    found = {"tok/s": sum(row["out_tok_s"] for row in rounds) / len(rounds)}
    for kind in ("ttft", "tpot"):
        spread = stats.spread_of([value for row in rounds for value in row[f"each_{kind}_ms"]])
        for key in ("p50", "p99"):
            if spread is not None:
                found[f"{kind} {key}"] = spread[key]
    return found


def compare(rows: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Every cell and system: its numbers, their ratio to the baseline, and the rounds' spread."""
    found: list[dict[str, Any]] = []
    good = [row for row in rows if "error" not in row and row["each_ttft_ms"]]
    for cell in dict.fromkeys(row["cell"] for row in good):
        base: dict[str, float] = {}
        of_cell = [row for row in good if row["cell"] == cell]
        systems = sorted({row["system"] for row in of_cell}, key=lambda name: name != baseline)
        for system in systems:
            rounds = [row for row in of_cell if row["system"] == system]
            values = pooled(rounds)
            if system == baseline:
                base = values
            rates = [row["out_tok_s"] for row in rounds]
            steady = [row["steady"] for row in rounds if "steady" in row]
            found.append({
                "cell": cell,
                "system": system,
                "rounds": len(rounds),
                "failed": sum(row["failed"] for row in rounds),
                "preempted": sum(row["preemptions"] for row in rounds),
                "values": values,
                "ratios": {k: v / base[k] for k, v in values.items() if base.get(k)},
                "spread": max(rates) / min(rates) - 1 if min(rates) else None,
                "steady": {
                    key: sum(part[key] for part in steady)
                    for key in ("seconds", "commits", "decommits")
                } if steady else None,
            })  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]], baseline: str) -> str:
    """Markdown. A number, then its ratio to the baseline."""
    kinds = ("tok/s", "ttft p50", "ttft p99", "tpot p50", "tpot p99")
    lines = [
        f"| cell | system | rounds | {' | '.join(kinds)} | spread | failed, preempted "
        "| mapped, unmapped |",
        "|---" * (len(kinds) + 6) + "|",
    ]
    for row in compare(rows, baseline):
        cells = [
            f"{row['values'][kind]:.2f} ({row['ratios'][kind]:.3f})" if kind in row["ratios"]
            else f"{row['values'].get(kind, float('nan')):.2f}"
            for kind in kinds
        ]  # fmt: skip
        spread = "-" if row["spread"] is None else f"{row['spread'] * 100:.1f} %"
        steady = row["steady"]
        calls = (
            f"{steady['commits']}, {steady['decommits']} in {steady['seconds']:.1f} s"
            if steady else "-"
        )  # fmt: skip
        bad = f"{row['failed']}, {row['preempted']}"
        parts = [row["cell"], row["system"], str(row["rounds"]), *cells, spread, bad, calls]
        lines.append(f"| {' | '.join(parts)} |")
    lines += [f"{row['error'].splitlines()[0][:300]}" for row in rows if "error" in row]
    return "\n".join(lines)
