# SPDX-License-Identifier: Apache-2.0
"""Two engines on one machine's memory, shown live: each takes what the other does not use.

    python -m benchmarks.demo --out build/demo.json
    python -m benchmarks.plot_memory build/demo.json docs/memory.png

It needs a vLLM with the kvcached patches (`nox -s demo` makes one) and runs on a GPU if there is
one, else on the CPU with tiny models.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.demo_view import View, make_view
from kvcached_core import Ledger
from kvcached_core.units import format_size
from tests.support.prompts import equal_prompts
from tests.support.server import Answer, Server, burst_async
from tests.support.tiny_model import LLAMA, TinySpec, make_tiny_model
from tests.support.watch import read

NAMES = ("alice", "bob")
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Stage:
    """What the machine determines: models, memory and load."""

    where: str
    spec: TinySpec
    args: tuple[str, ...]
    env: dict[str, str]
    requests: int
    prompt_tokens: int
    answer_tokens: int
    dummy: bool = False


def cpu_stage() -> Stage:
    """Tiny models; 96 MiB for both, of which one burst takes three quarters."""
    return Stage(
        "CPU",
        LLAMA,
        ("--dtype=float32", "--max-num-batched-tokens=2048", f"--kv-cache-memory-bytes={GIB}"),
        {
            "KVCACHED_CAPACITY": "96MiB",
            "KVCACHED_PAGE_SIZE": "256KiB",
            "KVCACHED_PARKED": "1MiB",
            "KVCACHED_PARKED_DECAY_MS": "500",
            "KVCACHED_COMMIT_AHEAD": "1MiB",
        },
        requests=28,
        prompt_tokens=1200,
        answer_tokens=128,
    )


def gpu_stage() -> Stage:
    """Models of about a billion parameters; all but 24 GiB of the GPU kept out of the demo."""
    import pynvml

    pynvml.nvmlInit()
    total = int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total)
    spec = TinySpec(
        layers=16, heads=32, kv_heads=8, head_dim=64, hidden=2048, intermediate=8192, max_len=8192
    )
    return Stage(
        "GPU",
        spec,
        ("--dtype=bfloat16",),
        {"KVCACHED_HEADROOM": str(max(total - 24 * GIB, 512 * MIB)), "KVCACHED_PARKED": "64MiB"},
        requests=96,
        prompt_tokens=3600,
        answer_tokens=256,
        dummy=True,
    )


def choose_stage(device: str) -> Stage:
    if device == "auto":
        import torch

        device = "gpu" if torch.cuda.is_available() else "cpu"
    return gpu_stage() if device == "gpu" else cpu_stage()


@dataclass
class Recording:
    """Everything the demo saw, as it is written to the JSON file."""

    device: str
    capacity: int = 0
    servers: list[str] = field(default_factory=lambda: list(NAMES))
    samples: list[dict[str, Any]] = field(default_factory=list)
    bursts: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Samples the ledger ten times a second and shows every sample."""

    def __init__(self, path: Path, recording: Recording, view: View) -> None:
        self._ledger = Ledger(path)
        self.recording = recording
        # What is left for KV caches: on a GPU the models themselves are not in the ledger's leases.
        recording.capacity = self._ledger.available() + self._ledger.total_leased()
        self._view = view
        self._begin = time.monotonic()
        self.in_flight = dict.fromkeys(NAMES, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def now(self) -> float:
        """Seconds since the recording began."""
        return time.monotonic() - self._begin

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            sample = read(self._ledger)
            row = {
                "t": round(self.now(), 3),
                "committed": {name: sample.committed.get(name, 0) for name in NAMES},
                "leased": {name: sample.leased.get(name, 0) for name in NAMES},
                "in_flight": dict(self.in_flight),
            }
            self.recording.samples.append(row)
            self._view.show(row, self.recording.capacity)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def servers(stage: Stage, folder: Path, view: View) -> Iterator[list[Server]]:
    """Both servers, ready. One starts after the other: each measures its memory as it does."""
    model = make_tiny_model(folder / "model", stage.spec, weights=not stage.dummy)
    args = [
        "--enforce-eager",
        f"--max-model-len={stage.spec.max_len}",
        "--max-num-seqs=128",
        "--no-enable-prefix-caching",
        *stage.args,
        *(["--load-format=dummy"] if stage.dummy else []),
    ]
    with ExitStack() as stack:
        started = []
        for name in NAMES:
            env = stage.env | {
                "ENABLE_KVCACHED": "true",
                "KVCACHED_NAME": name,
                "KVCACHED_LEDGER_DIR": str(folder / "ledger"),
            }
            server = Server(name, model, folder, args, env, fixed=stage.where == "CPU")
            stack.callback(server.stop)
            with view.step(f"starting {name} on the {stage.where}"):
                server.start().wait_ready(timeout_s=300)
            started.append(server)
        yield started


async def play(
    stage: Stage, pair: Sequence[Server], recorder: Recorder, turns: int, view: View
) -> list[Answer]:
    """Bursts in turn, then both at once: more than there is, so some of it has to wait."""
    answers: list[Answer] = []

    async def one(server: Server, seed: int) -> None:
        def note(change: int) -> None:
            recorder.in_flight[server.name] += change

        prompts = equal_prompts(stage.requests, stage.prompt_tokens, seed)
        begin = recorder.now()
        answers.extend(await burst_async(server, prompts, stage.answer_tokens, note))
        recorder.recording.bursts.append(
            {"server": server.name, "begin": begin, "end": recorder.now(), "requests": len(prompts)}
        )

    await asyncio.sleep(1)
    for turn in range(turns):
        server = pair[turn % 2]
        view.say(f"burst {turn + 1} of {turns + 1}: {stage.requests} requests to {server.name}")
        await one(server, turn)
        await asyncio.sleep(1.5)
    view.say(f"burst {turns + 1} of {turns + 1}: {stage.requests} requests to each, at once")
    await asyncio.gather(*(one(server, 1000 + i) for i, server in enumerate(pair)))
    await asyncio.sleep(3)
    return answers


def summarize(recording: Recording, answers: Sequence[Answer]) -> dict[str, Any]:
    """The closing figures; of what was measured only."""
    rows = recording.samples
    peaks = {name: max(row["committed"][name] for row in rows) for name in NAMES}
    done = [answer for answer in answers if answer.status == 200]
    return {
        "requests": len(answers),
        "completed": len(done),
        "mean_seconds": statistics.fmean(a.seconds for a in done) if done else None,
        "capacity": recording.capacity,
        "peak_committed": peaks,
        "peak_committed_together": max(sum(row["committed"].values()) for row in rows),
        "peak_leased_together": max(sum(row["leased"].values()) for row in rows),
        "idle_committed": rows[-1]["committed"],
    }


def print_summary(summary: dict[str, Any]) -> None:
    capacity = summary["capacity"]
    peaks = summary["peak_committed"]
    print()
    print(f"{summary['completed']} of {summary['requests']} requests completed", end="")
    if summary["mean_seconds"] is not None:
        print(f", {summary['mean_seconds']:.2f} s each on average", end="")
    print(".")
    print(f"Memory for the KV caches of both: {format_size(capacity)}.")
    for name, peak in peaks.items():
        share, idle = peak / capacity, summary["idle_committed"][name]
        print(f"  {name}: {format_size(peak)} at its peak ({share:.0%}), {format_size(idle)} idle")
    print(
        f"The peaks add up to {sum(peaks.values()) / capacity:.2f} times that memory; never was "
        f"more than {summary['peak_leased_together'] / capacity:.0%} of it promised at once."
    )


def run(args: argparse.Namespace) -> int:
    view = make_view(NAMES, plain=args.plain)
    stage = choose_stage(args.device)
    with tempfile.TemporaryDirectory(prefix="kvcached-demo-") as name, view:
        folder = Path(name)
        with servers(stage, folder, view) as pair:
            (ledger,) = (folder / "ledger").glob("*.ledger")
            recording = Recording(stage.where)
            with Recorder(ledger, recording, view) as recorder:
                answers = asyncio.run(play(stage, pair, recorder, args.turns, view))
    recording.summary = summarize(recording, answers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(vars(recording)) + "\n")
    print_summary(recording.summary)
    print(f"Samples: {args.out} (a figure: python -m benchmarks.plot_memory {args.out} FILE.png)")
    return 0 if recording.summary["completed"] == recording.summary["requests"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build/demo.json"), help="samples (JSON)")
    parser.add_argument("--turns", type=int, default=4, help="bursts before both burst at once")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--plain", action="store_true", help="lines of text even on a terminal")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
