# SPDX-License-Identifier: Apache-2.0
"""One engine with the feature on against the unpatched one: what a request notices.

    ENGINE_STOCK=... ENGINE_PATCHED=... python benchmarks/overhead.py --out build/overhead \
        --systems static elastic --cells 1x128x128 8x1024x128 64x1024x128 256x256x128 --rounds 3

A cell is `CONCURRENCYxTOKENS_INxTOKENS_OUT[:REQUESTS]`: as one request ends the next is sent. All
systems are started once, each with an equal part of the GPU, and take turns round by round while
the others are idle. With `--apart` they are started one after another instead, in the order given:
`--systems static elastic static`. Every round is written to `rounds.jsonl` as it ends.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.tokens_and_throughput import DeviceMemory
from benchmarks.serving import stats
from benchmarks.serving.cell import jobs, warm_up
from benchmarks.serving.client import play
from benchmarks.serving.closed_loop import ClosedCell, measured, table
from benchmarks.serving.fleet import Fleet, raise_file_limit, running
from benchmarks.serving.model import SHAPES
from benchmarks.serving.observe import LedgerWatch
from benchmarks.serving.setup import (
    Clock,
    OutOfTime,
    add_options,
    parse_system,
    plan_for,
    wait_for_memory,
)
from benchmarks.serving.systems import System

CELLS = [
    ClosedCell.parse(text) for text in ("1x128x128", "8x1024x128", "64x1024x128", "256x256x128")
]


@dataclass
class Started:
    """A system whose server runs."""

    system: System
    fleet: Fleet
    folder: Path


class Overhead:
    """One run of the program."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.clock = Clock(args.limit)
        self.memory = DeviceMemory()
        self.empty_mib = self.memory.used() >> 20
        self.rounds: list[dict[str, Any]] = []
        args.out.mkdir(parents=True, exist_ok=True)

    def note(self, row: dict[str, Any]) -> None:
        """Writes what is known at once."""
        self.rounds.append(row)
        with (self.args.out / "rounds.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        print(json.dumps({k: v for k, v in row.items() if not k.startswith("each_")}), flush=True)

    def start(self, stack: ExitStack, system: System, turn: str) -> Started:
        """The system's server, ready and warm."""
        args = self.args
        if self.clock.left() < args.least_s:
            raise OutOfTime(f"{self.clock.left():.0f} s left to start {system.text}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcached-bench-")))
        plan = plan_for(args, system, folder, self.clock.left() - 30, turn)
        fleet = stack.enter_context(running(plan, 1))
        wanted = [(cell.prompt, min(cell.output, 16)) for cell in args.cells for _ in range(2)]
        warm_up(fleet, wanted, folder, SHAPES["tiny" if args.tiny else args.shape].vocab)
        ready = {"system": system.text, "start_s": fleet.start_s, "at_s": self.clock.spent()}
        print(json.dumps(ready | {"device_mib": self.memory.used() >> 20}), flush=True)
        return Started(system, fleet, folder)

    def measure(self, started: Started, cell: ClosedCell, number: int) -> None:
        """One round of one cell."""
        args, fleet = self.args, started.fleet
        drain_s = min(args.cell_limit, self.clock.left() - 10)
        vocab = SHAPES["tiny" if args.tiny else args.shape].vocab
        todo = jobs(
            fleet, cell.pattern(), started.folder, vocab, drain_s,
            # The same prompts for all systems and turns, and others in every round.
            seed=args.seed + number % args.rounds, concurrency=cell.concurrency, shared=args.shared,
        )  # fmt: skip
        self.memory.take_peak()
        before = sum(fleet.preemptions())
        with LedgerWatch(fleet.ledger and fleet.ledger.resolve(), self.memory.used) as watch:
            (run,) = play(todo, drain_s + 20)
        row: dict[str, Any] = {"system": started.system.text, "cell": cell.text, "round": number}
        row |= {"at_s": self.clock.spent(), "prefix_cache": args.prefix_cache}
        row |= measured(cell, run, watch.timeline.since(run.begin))
        row["preemptions"] = sum(fleet.preemptions()) - before
        row |= {"peak_mib": self.memory.take_peak() >> 20, "client": stats.client_lag([run])}
        row["client"].pop("send_ms")  # All are due at once; they wait for their turn.
        self.note(row)
        if fleet.dead():
            raise RuntimeError(f"{started.system.text} ended: {fleet.tails()}")

    def room_for(self, cell: ClosedCell) -> bool:
        """Whether a round of it can end in time, judged by those there were."""
        before = [row["seconds"] for row in self.rounds if row.get("cell") == cell.text]
        return self.clock.left() > max(before, default=0.0) * 1.2 + 20

    def together(self) -> None:
        """All systems at the same time; rounds take turns."""
        with ExitStack() as stack:
            started = [self.start(stack, s, f"-{i}") for i, s in enumerate(self.args.systems)]
            for cell in self.args.cells:
                for number in range(self.args.rounds):
                    # Forth and back, so that none is always the one that comes after a pause.
                    for one in started if number % 2 == 0 else reversed(started):
                        if not self.room_for(cell):
                            raise OutOfTime(f"{self.clock.left():.0f} s left at {cell.text}")
                        self.measure(one, cell, number)
                print(self.table(), flush=True)

    def apart(self) -> None:
        """One system after another."""
        for turn, system in enumerate(self.args.systems):
            wait_for_memory(self.memory, self.empty_mib)
            with ExitStack() as stack:
                started = self.start(stack, system, f"-{turn}")
                for cell in self.args.cells:
                    for number in range(self.args.rounds):
                        if not self.room_for(cell):
                            raise OutOfTime(f"{self.clock.left():.0f} s left at {cell.text}")
                        self.measure(started, cell, turn * self.args.rounds + number)

    def table(self) -> str:
        return table(self.rounds, self.args.systems[0].text)

    def run(self) -> int:
        """Everything; what was measured before something went wrong is shown."""
        failed = False
        try:
            (self.apart if self.args.apart else self.together)()
        except Exception as error:
            kind = "not run" if isinstance(error, OutOfTime) else "failed"
            first, _, rest = str(error).partition("\n")
            text = f"{kind}: {type(error).__name__}: {first}"
            self.note({"error": text, "detail": rest[-6000:]})
            failed = True
        finally:
            self.memory.stop()
        print(self.table())
        return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description="What one engine costs with the feature on.")
    parser.add_argument("--systems", nargs="+", type=parse_system,
                        default=[parse_system("static"), parse_system("elastic")])  # fmt: skip
    parser.add_argument("--cells", nargs="+", type=ClosedCell.parse, default=CELLS)
    parser.add_argument("--out", type=Path, default=Path("build/overhead"))
    parser.add_argument("--rounds", type=int, default=2, help="of each cell and system")
    parser.add_argument("--apart", action="store_true", help="one system after another")
    parser.add_argument("--runner", choices=("v1", "v2", ""), default="v2", help="model runner")
    parser.add_argument("--cell-limit", type=float, default=150, help="seconds for one round")
    parser.add_argument("--least-s", type=float, default=60, help="not started with less left")
    parser.add_argument("--show", type=Path, help="print the table of a rounds.jsonl")
    add_options(parser)
    args = parser.parse_args()
    if args.show:
        rows = [json.loads(line) for line in args.show.read_text().splitlines()]
        print(table(rows, args.systems[0].text))
        return 0
    # What each of the systems that are there together may take.
    args.models = 1 if args.apart else len(args.systems)
    if args.tiny:
        args.max_model_len, args.runner = 4096, ""  # V2 needs Triton
    longest = max(cell.prompt + cell.output for cell in args.cells)
    args.max_model_len = max(args.max_model_len, longest)
    # Ended from outside, the servers must end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_file_limit()
    begin = time.monotonic()
    code = Overhead(args).run()
    print(f"{time.monotonic() - begin:.0f} s")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
