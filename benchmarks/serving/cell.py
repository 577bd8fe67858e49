# SPDX-License-Identifier: Apache-2.0
"""One cell of a table: one pattern on the running servers of one system."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.tokens_and_throughput import DeviceMemory
from benchmarks.serving import stats
from benchmarks.serving.client import Job, Run, play
from benchmarks.serving.fleet import Fleet
from benchmarks.serving.footprint import Paging, footprint, quiet_moment
from benchmarks.serving.observe import LedgerWatch, Timeline
from benchmarks.serving.patterns import Arrival, Pattern

SETTLE_S = 4.0
"""After the last answer; then memory is looked at again."""
_PREPARE_S = 20.0


def jobs(
    fleet: Fleet,
    pattern: Pattern,
    folder: Path,
    vocab: int,
    drain_s: float,
    seed: int,
    *,
    concurrency: int = 0,
    shared: float = 0.0,
) -> list[Job]:
    """One client for each server."""
    return [
        Job(
            url=server.url + "/v1/completions",
            model=str(server.model),
            arrivals=arrivals,
            out=str(folder.resolve() / f"client-{server.name}.json"),
            seed=seed * 1000 + i,
            vocab=vocab,
            drain_s=drain_s,
            concurrency=concurrency,
            shared=shared,
        )
        for i, (server, arrivals) in enumerate(zip(fleet.servers, pattern.models, strict=True))
    ]


def warm_up(
    fleet: Fleet, lengths: Sequence[tuple[int, int]], folder: Path, vocab: int
) -> list[Run]:
    """A few requests to every server: the first ones still compile kernels."""
    arrivals = [Arrival(0.0, prompt, output, "warm-up") for prompt, output in lengths]
    pattern = Pattern("warm-up", [arrivals for _ in fleet.servers])
    runs = play(jobs(fleet, pattern, folder, vocab, 120.0, seed=99), 150.0)
    errors = [row.error for run in runs for row in run.rows if row.error]
    if errors:
        raise RuntimeError(f"warm-up failed: {errors[0]}")
    return runs


def run_cell(
    fleet: Fleet,
    pattern: Pattern,
    folder: Path,
    memory: DeviceMemory,
    *,
    vocab: int,
    drain_s: float,
    seed: int,
    shared: float = 0.0,
    paging: Paging | None = None,
) -> tuple[dict[str, Any], list[Run], Timeline]:
    """The cell's report, its requests, and memory until `SETTLE_S` after them."""
    before = fleet.preemptions()
    idle = memory.used()
    memory.take_peak()
    limit_s = pattern.seconds + drain_s + _PREPARE_S
    with LedgerWatch(fleet.ledger and fleet.ledger.resolve(), memory.used) as watch:
        at_rest = watch.now()
        runs = play(jobs(fleet, pattern, folder, vocab, drain_s, seed, shared=shared), limit_s)
        peak = memory.take_peak()
        time.sleep(SETTLE_S)
    timeline = watch.timeline.since(runs[0].begin)
    preemptions = [
        max(after - start, 0) for after, start in zip(fleet.preemptions(), before, strict=True)
    ]
    report: dict[str, Any] = {
        "pattern": pattern.name,
        "seconds": pattern.seconds,
        "phases": stats.by_phase(runs),
        "output_tok_s": round(stats.output_rate(runs), 1),
        "preemptions": sum(preemptions),
        "models": [
            {
                "name": server.name,
                "phases": stats.by_phase([run]),
                "output_tok_s": round(stats.output_rate([run]), 1),
                "preemptions": count,
            }
            for server, run, count in zip(fleet.servers, runs, preemptions, strict=True)
        ],
        "client": stats.client_lag(runs),
        "memory_mib": {
            "idle": idle >> 20,
            "peak": peak >> 20,
            "after": memory.used() >> 20,
        },
        "dead": fleet.dead(),
    }
    if fleet.ledger is not None:
        report["ledger"] = {"idle": at_rest, "members": watch.report(), "after": watch.now()}
        if paging is not None:
            report["footprint"] = _footprints(fleet, pattern, runs, timeline, paging)
    return report, runs, timeline


def _footprints(
    fleet: Fleet,
    pattern: Pattern,
    runs: Sequence[Run],
    timeline: Timeline,
    paging: Paging,
) -> dict[str, Any]:
    """Of every model with a tail, once all but the tail has ended."""
    found = {}
    for server, arrivals, run in zip(fleet.servers, pattern.models, runs, strict=True):
        moment = quiet_moment(run.rows, SETTLE_S)
        held = timeline.at(moment[0]).get(server.name) if moment else None
        if moment and held:
            at, settled = moment
            found[server.name] = footprint(arrivals, run.rows, held, paging, at)
            found[server.name]["settled_s"] = round(settled, 2)
    return found
