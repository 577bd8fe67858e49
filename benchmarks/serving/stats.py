# SPDX-License-Identifier: Apache-2.0
"""From what clients saw to the numbers of a report. Times are milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.client import Run, Sent


def spread_of(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 99th percentile and largest; None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    found = {"mean": np.mean(values), "p50": p50, "p99": p99, "max": max(values)}
    return {name: round(float(value), 3) for name, value in found.items()}


def ttft(row: Sent) -> float:
    """From sending the request to its first token."""
    return (row.first - row.sent) * 1000


def tpot(row: Sent) -> float:
    """Between two tokens after the first, on average over the request."""
    return (row.last - row.first) * 1000 / (row.tokens - 1)


def requests(rows: Iterable[Sent]) -> dict[str, Any]:
    """Failures, and the times of what did not fail."""
    rows = list(rows)
    good = [row for row in rows if not row.error]
    errors: dict[str, int] = {}
    for row in rows:
        if row.error:
            errors[row.error] = errors.get(row.error, 0) + 1
    return {
        "requests": len(rows),
        "failed": len(rows) - len(good),
        "errors": dict(sorted(errors.items(), key=lambda item: -item[1])[:5]),
        "ttft_ms": spread_of([ttft(row) for row in good]),
        "tpot_ms": spread_of([tpot(row) for row in good if row.tokens > 1]),
        "e2e_ms": spread_of([(row.last - row.sent) * 1000 for row in good]),
    }


def by_phase(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Each phase by itself: what the pattern is about, and what only keeps models awake."""
    phases = sorted({row.phase for run in runs for row in run.rows})
    return {
        phase: requests(row for run in runs for row in run.rows if row.phase == phase)
        for phase in phases
    }


def output_rate(runs: Sequence[Run]) -> float:
    """Output tokens a second, from the first request to the last token."""
    rows = [row for run in runs for row in run.rows if not row.error]
    if not rows:
        return 0.0
    return sum(row.tokens for row in rows) / (
        max(row.last for row in rows) - min(row.sent for row in rows)
    )


def client_lag(runs: Sequence[Run]) -> dict[str, Any]:
    """How late requests were sent, and how late the clients' loops were: large, if too slow."""
    sends = [(row.sent - row.due) * 1000 for run in runs for row in run.rows if row.sent >= 0]
    return {
        "send_ms": spread_of(sends),
        "loop_ms": spread_of([beat * 1000 for run in runs for beat in run.beats]),
    }
