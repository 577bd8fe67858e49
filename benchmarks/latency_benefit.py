# SPDX-License-Identifier: Apache-2.0
"""Three servers on one GPU under bursty load: how long the first token takes, system by system.

    ENGINE_STOCK=... ENGINE_PATCHED=... PYTHONPATH=... python benchmarks/latency_benefit.py run \
        --out build/latency --systems static-mps elastic-mps --patterns stag:24 over:24 stag:40
    python benchmarks/latency_benefit.py compare build/latency/cells.jsonl --baseline static-mps

The servers of a system are started once and take the patterns one after another. A line is written
to `cells.jsonl` as soon as a cell ends. Patterns: benchmarks/serving/patterns.py, systems:
benchmarks/serving/systems.py.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.tokens_and_throughput import DeviceMemory
from benchmarks.serving import density
from benchmarks.serving.cell import SETTLE_S, run_cell, warm_up
from benchmarks.serving.client import Run
from benchmarks.serving.fleet import Fleet, raise_file_limit, running
from benchmarks.serving.model import SHAPES
from benchmarks.serving.observe import Timeline
from benchmarks.serving.patterns import Lengths, Pattern, parse
from benchmarks.serving.report import brief, table
from benchmarks.serving.setup import (
    Clock,
    OutOfTime,
    add_options,
    paging_of,
    parse_system,
    plan_for,
    wait_for_memory,
)
from benchmarks.serving.systems import System


class Results:
    """Writes every result at once, so that a run that is cut off leaves what it had."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cells: list[dict[str, Any]] = []
        self.empty_mib = 0
        """In use on the device before anything was started."""

    def cell(self, report: dict[str, Any]) -> None:
        self.cells.append(report)
        self._append("cells.jsonl", report)
        print(brief(report), flush=True)
        for name, member in report.get("ledger", {}).get("members", {}).items():
            if "growth" in member:
                print(f"  {name} while growing: {json.dumps(member['growth'])}", flush=True)
        for name, found in report.get("footprint", {}).items():
            print(f"  {name} with a tail: {json.dumps(found)}", flush=True)

    def timeline(self, system: str, pattern: str, timeline: Timeline) -> None:
        self._append("timeline.jsonl", {"system": system, "pattern": pattern, **timeline.as_json()})

    def requests(self, system: str, pattern: str, runs: list[Run]) -> None:
        rows = [
            [[r.phase, *(round(t, 4) for t in (r.due, r.sent, r.first, r.last)), r.tokens, r.error]
             for r in run.rows]
            for run in runs
        ]  # fmt: skip
        self._append("requests.jsonl", {"system": system, "pattern": pattern, "models": rows})

    def _append(self, name: str, value: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            print(json.dumps(value), file=file)


def lengths_of(args: argparse.Namespace) -> Lengths:
    return Lengths(args.prompt, args.output, args.long_prompt, args.output)


def run_system(
    args: argparse.Namespace,
    system: System,
    patterns: list[Pattern],
    memory: DeviceMemory,
    clock: Clock,
    results: Results,
) -> None:
    """All patterns on one system; what goes wrong becomes a cell with an `error`."""
    left = [pattern.name for pattern in patterns]
    base = {"system": system.text, "runner": args.runner, "started_at_s": clock.spent()}
    base |= {"engines": args.models, "shape": args.shape, "prefix_cache": args.prefix_cache}
    fleet: Fleet | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="kvcached-bench-") as name:
            folder = Path(name)
            plan = plan_for(args, system, folder, clock.left() - 30)
            if clock.left() < args.least_s:
                raise OutOfTime(f"{clock.left():.0f} s left, a start needs {args.least_s:.0f}")
            before = wait_for_memory(memory, results.empty_mib)
            with running(plan, args.models) as fleet:
                base |= {"start_s": fleet.start_s, "start_retried": fleet.retried}
                base["ready_at_s"] = clock.spent()
                vocab = SHAPES["tiny" if args.tiny else args.shape].vocab
                wanted = [(args.prompt, args.output)] * 5
                if any(pattern.name.startswith(("long", "grow")) for pattern in patterns):
                    wanted.append((args.long_prompt, 8))
                warm_up(fleet, wanted, folder, vocab)
                time.sleep(SETTLE_S)
                base["memory_before_start_mib"] = before
                base["memory_ready_mib"] = memory.used() >> 20
                for index, pattern in enumerate(patterns):
                    if clock.left() < pattern.seconds + 15:
                        raise OutOfTime(f"{clock.left():.0f} s left")
                    drain_s = min(args.drain, clock.left() - pattern.seconds - 10)
                    report, runs, timeline = run_cell(
                        fleet,
                        pattern,
                        folder,
                        memory,
                        vocab=vocab,
                        drain_s=drain_s,
                        seed=args.seed + index,
                        shared=args.shared,
                        paging=paging_of(args, system),
                    )
                    left.pop(0)
                    if report["dead"]:
                        report["tails"] = fleet.tails()
                    results.requests(system.text, pattern.name, runs)
                    results.timeline(system.text, pattern.name, timeline)
                    results.cell(base | report)
                    if report["dead"]:
                        raise RuntimeError(f"{', '.join(report['dead'])} ended")
                    if index + 1 < len(patterns):
                        time.sleep(max(0.0, args.pause - SETTLE_S))
    except Exception as error:
        kind = "not run" if isinstance(error, OutOfTime) else "failed"
        tails = fleet.tails() if fleet is not None and kind == "failed" else {}
        first, _, rest = str(error).partition("\n")
        text = f"{kind}: {type(error).__name__}: {first}"
        for pattern_name in left:
            detail = {"detail": rest[-6000:], "tails": tails}
            results.cell(base | {"pattern": pattern_name, "error": text, **detail})
            rest, tails = "", {}
        if kind == "failed":
            print(results.cells[-len(left)]["detail"] if left else text, flush=True)
            for name, tail in (fleet.tails() if fleet is not None else {}).items():
                print(f"--- end of {name}'s output\n{tail}", flush=True)


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.prompt, args.output = min(args.prompt, 64), min(args.output, 32)
        args.long_prompt, args.max_model_len = min(args.long_prompt, 1024), 4096
    clock = Clock(args.limit)
    results = Results(args.out)
    patterns = [parse(text, args.models, lengths_of(args)) for text in args.patterns]
    for pattern in patterns:
        if pattern.longest > args.max_model_len:
            raise SystemExit(f"{pattern.name} has requests longer than --max-model-len")
    memory = DeviceMemory()
    results.empty_mib = memory.used() >> 20
    try:
        setup = {
            "command": " ".join(sys.argv),
            "open_files": raise_file_limit(),
            "lengths": asdict(lengths_of(args)),
            "device_mib_before": results.empty_mib,
        }
        print(json.dumps(setup), flush=True)
        (args.out / "setup.json").write_text(json.dumps(setup) + "\n")
        for system in args.systems:
            run_system(args, system, patterns, memory, clock, results)
    finally:
        memory.stop()
    print(table(results.cells, args.baseline or args.systems[0].text))
    return 1 if any("error" in cell for cell in results.cells) else 0


def compare(args: argparse.Namespace) -> int:
    cells = [json.loads(line) for path in args.cells for line in path.read_text().splitlines()]
    print(table(cells, args.baseline, models=args.models, markdown=args.markdown))
    return 0


def show_density(args: argparse.Namespace) -> int:
    cells = [json.loads(line) for path in args.cells for line in path.read_text().splitlines()]
    print(density.table(cells, args.objective))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to first token of servers on one GPU.")
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("run", help="start systems and measure")
    make.set_defaults(function=run)
    make.add_argument("--systems", nargs="+", type=parse_system, required=True)
    make.add_argument("--patterns", nargs="+", default=["stag:24", "over:24", "stag:40", "long:24"])
    make.add_argument("--out", type=Path, default=Path("build/latency"))
    add_options(make)
    make.add_argument("--least-s", type=float, default=90, help="not started with less time left")
    make.add_argument("--models", type=int, default=3, help="servers")
    make.add_argument("--runner", choices=("v1", "v2", ""), default="v1", help="model runner")
    make.add_argument("--prompt", type=int, default=256)
    make.add_argument("--output", type=int, default=256)
    make.add_argument("--long-prompt", type=int, default=6144)
    make.add_argument("--drain", type=float, default=90, help="wait so long for late answers")
    make.add_argument("--pause", type=float, default=6, help="seconds between two patterns")
    make.add_argument("--baseline", default="", help="of the ratios; else the first system")
    show = commands.add_parser("compare", help="print a table of cells that were measured")
    show.set_defaults(function=compare)
    show.add_argument("cells", nargs="+", type=Path)
    show.add_argument("--baseline", required=True)
    show.add_argument("--models", action="store_true", help="a line for every model, too")
    show.add_argument("--markdown", action="store_true")
    many = commands.add_parser("density", help="how many engines met an objective")
    many.set_defaults(function=show_density)
    many.add_argument("cells", nargs="+", type=Path)
    many.add_argument("--objective", type=float, default=500, help="TTFT in ms, 99th percentile")
    args = parser.parse_args()
    # Ended from outside, the servers must end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return int(args.function(args))


if __name__ == "__main__":
    raise SystemExit(main())
