# SPDX-License-Identifier: Apache-2.0
"""What one engine's end does to its neighbours, with and without MPS.

    ENGINE_PATCHED=... PYTHONPATH=... python benchmarks/gpu/mps_crash.py --out build/crash.json

Three elastic engines under load, a model small enough to start fast with weights whose answers
depend on the KV cache. Then, for `elastic-mps` and for `elastic`:

1. kill: one engine is killed (SIGKILL) in the middle of the load. Do the others' requests fail, is
   its memory free again, and does the ledger have its bytes back?
2. fault: a further process's kernel writes to an unmapped address. Who ends, with what error?
3. recovery: whoever ended is started again. Do all give the answers they gave at the beginning?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.tokens_and_throughput import DeviceMemory
from benchmarks.serving.fleet import Fleet, Plan, compile_cache, running
from benchmarks.serving.observe import LedgerWatch
from benchmarks.serving.systems import System
from kvcached_core import Ledger
from kvcached_core.mps import MpsError
from tests.support.engines import ENVIRONMENT
from tests.support.prompts import equal_prompts
from tests.support.server import Server, burst_async
from tests.support.tiny_model import LLAMA, TinySpec, make_tiny_model

MEDIUM = TinySpec(
    layers=8,
    heads=16,
    kv_heads=8,
    head_dim=64,
    hidden=1024,
    intermediate=2816,
    vocab=8192,
    max_len=8192,
)
COUNT = 3
VICTIM = 1
PROMPT, OUTPUT = 1000, 64


@dataclass(frozen=True)
class Seen:
    """One request's end."""

    at: float
    status: int
    error: str


class Load:
    """Requests one after another in several lanes, good or bad, until it is left."""

    def __init__(self, server: Server, lanes: int, timeout_s: float) -> None:
        self.server = server
        self.seen: list[Seen] = []
        self._lanes = lanes
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        await asyncio.gather(*(self._lane(i) for i in range(self._lanes)))

    async def _lane(self, lane: int) -> None:
        turn = 0
        while not self._stop.is_set():
            prompts = equal_prompts(1, PROMPT, 1000 * lane + turn)
            turn += 1
            status, error = 0, ""
            try:
                (answer,) = await burst_async(
                    self.server, prompts, OUTPUT, timeout_s=self._timeout_s
                )
                status, error = answer.status, answer.error
            except (TimeoutError, asyncio.TimeoutError):
                error = f"no answer within {self._timeout_s:.0f} s"
            self.seen.append(Seen(time.monotonic(), status, error[:120]))
            if status != 200:
                await asyncio.sleep(0.2)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._timeout_s + 30)

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """What came between two moments."""
        rows = [row for row in self.seen if begin <= row.at < end]
        errors = Counter(row.error for row in rows if row.status != 200)
        return {
            "answered": sum(row.status == 200 for row in rows),
            "failed": sum(errors.values()),
            "errors": dict(errors.most_common(3)),
        }


def answers(server: Server) -> list[list[int]]:
    """Greedy answers to prompts sent one by one, since a batch's composition changes some."""
    return [
        asyncio.run(burst_async(server, [prompt], OUTPUT, timeout_s=60))[0].tokens
        for prompt in equal_prompts(6, 700, 5)
    ]


def look(fleet: Fleet, memory: DeviceMemory) -> dict[str, Any]:
    """Who lives, and who holds what."""
    assert fleet.ledger is not None
    state: Any = None
    if fleet.mps is not None:
        try:
            servers = fleet.mps.status().servers
            state = [{"state": s.state, "clients": len(s.clients)} for s in servers]
        except MpsError as error:
            state = str(error)
    return {
        "exit_status": {server.name: server.code for server in fleet.servers},
        "device_mib": memory.used() >> 20,
        "ledger": LedgerWatch(fleet.ledger).now(),
        "mps_servers": state,
    }


def under_load(fleet: Fleet, args: argparse.Namespace, strike: Any) -> dict[str, Any]:
    """The load on every engine before and after what `strike` does."""
    loads = [Load(server, args.lanes, args.timeout) for server in fleet.servers]
    for load in loads:
        load.__enter__()
    try:
        begin = time.monotonic()
        time.sleep(args.seconds)
        struck = time.monotonic()
        said = strike()
        time.sleep(args.seconds)
        end = time.monotonic()
    finally:
        for load in loads:
            load.__exit__()
    return {
        "strike": said,
        "before": {load.server.name: load.between(begin, struck) for load in loads},
        "after": {load.server.name: load.between(struck, end + 1e9) for load in loads},
    }


def kill(fleet: Fleet, args: argparse.Namespace, memory: DeviceMemory) -> dict[str, Any]:
    victim = fleet.servers[VICTIM]
    report: dict[str, Any] = {"idle": look(fleet, memory)}

    def strike() -> dict[str, Any]:
        loaded = look(fleet, memory)
        victim.kill()
        return {"loaded": loaded, "killed": victim.name}

    report |= under_load(fleet, args, strike)
    report["afterwards"] = look(fleet, memory)
    assert fleet.ledger is not None
    (path,) = fleet.ledger.glob("*.ledger")
    ledger = Ledger(path)
    # Done already if a neighbour needed the bytes.
    report["reaped"] = {member.name: member.leased for member in ledger.reap()}
    report["members"] = [member.name for member in ledger.members()]
    return report


def fault(fleet: Fleet, args: argparse.Namespace, memory: DeviceMemory) -> dict[str, Any]:
    script = Path(__file__).with_name("fatal_fault.py")
    # The environment of the engines makes it a client of the same MPS server.
    env = fleet.servers[0]._env
    culprit = subprocess.Popen(
        [sys.executable, str(script)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert culprit.stdout is not None
    if culprit.stdout.readline() != "ready\n":
        _, errors = culprit.communicate()
        return {"error": f"the culprit did not start: {errors[-1500:]}"}

    def strike() -> dict[str, Any]:
        try:
            said, errors = culprit.communicate("now\n", timeout=60)
        except subprocess.TimeoutExpired:
            culprit.kill()
            return {"culprit": "hangs"}
        return {"culprit": said.strip() or errors[-500:], "exit_status": culprit.returncode}

    report = under_load(fleet, args, strike)
    report["afterwards"] = look(fleet, memory)
    report["last_words"] = {server.name: errors_in(server.output()) for server in fleet.servers}
    return report


def errors_in(output: str) -> list[str]:
    """Lines of a log that name a CUDA error, or the end of the engine."""
    words = ("CUDA error", "cudaError", "CUDA driver error", "EngineDeadError", "Xid", "MPS")
    found = [line[-300:] for line in output.splitlines() if any(word in line for word in words)]
    return list(dict.fromkeys(found))[:6]


def recover(fleet: Fleet, before: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Starts again whoever ended, or does not answer any more, and compares the answers."""
    report: dict[str, Any] = {"restarted": {}, "same_answers": {}}
    for server in fleet.servers[:]:
        status, _ = probe(server)
        if status != 200:
            # A further client waits until the broken server's last client is gone.
            server.stop(5.0)
            report["restarted"][server.name] = None
    for name in report["restarted"]:
        begin = time.monotonic()
        try:
            fleet.restart(name, 120.0)
            report["restarted"][name] = round(time.monotonic() - begin, 1)
        except RuntimeError as error:
            report["restarted"][name] = str(error)[-1500:]
    for server in fleet.servers:
        try:
            report["same_answers"][server.name] = answers(server) == before[server.name]
        except Exception as error:
            report["same_answers"][server.name] = repr(error)[:300]
    return report


def probe(server: Server) -> tuple[int, str]:
    """Whether it still answers: status and error of a short request."""
    if server.code is not None:
        return 0, f"ended with {server.code}"
    body = {"model": str(server.model), "prompt": [5, 6, 7], "max_tokens": 2}
    try:
        return server.post("/v1/completions", body, timeout_s=15)
    except OSError as error:
        return 0, repr(error)


def run(args: argparse.Namespace, text: str, folder: Path, memory: DeviceMemory) -> dict[str, Any]:
    system = System.parse(text)
    spec = LLAMA if args.tiny else MEDIUM
    logs = args.out.parent / f"crash-{text}"
    logs.mkdir(parents=True, exist_ok=True)
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "KVCACHED_PARKED": "64MiB"}
    env |= compile_cache(folder / "compiled")
    if args.tiny:
        env |= ENVIRONMENT | {"KVCACHED_CAPACITY": "192MiB", "KVCACHED_PAGE_SIZE": "256KiB"}
    options = ["--no-enable-prefix-caching", "--enforce-eager", "--disable-uvicorn-access-log"]
    options += [f"--max-model-len={spec.max_len}"]
    options += ["--dtype=float32" if args.tiny else "--dtype=bfloat16"]
    if args.tiny:
        options.append("--kv-cache-memory-bytes=67108864")
    plan = Plan(
        system,
        make_tiny_model(folder / "model", spec),
        options,
        env,
        logs,
        folder / f"ledger-{text}",
        fixed=args.tiny,
        deadline=time.monotonic() + args.limit,
    )
    report: dict[str, Any] = {"device_mib_before": memory.used() >> 20}
    with running(plan, COUNT) as fleet:
        before = {server.name: answers(server) for server in fleet.servers}
        report["all_alike"] = len({json.dumps(found) for found in before.values()}) == 1
        report["distinct_tokens"] = len({t for a in before["alice"] for t in a})
        report["start_s"] = dict(fleet.start_s)
        parts = {"kill": kill, "fault": fault}
        for part in args.parts:
            try:
                report[part] = parts[part](fleet, args, memory)
                report[part]["recovery"] = recover(fleet, before)
            except Exception as error:
                report[part] = {"error": repr(error)[:2000], "tails": fleet.tails()}
                break
            finally:
                print(text, part, json.dumps(report.get(part)), flush=True)
    report["device_mib_after"] = memory.used() >> 20
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="One engine's end, and its neighbours.")
    parser.add_argument("--out", type=Path, default=Path("build/crash.json"))
    parser.add_argument("--systems", nargs="+", default=["elastic-mps", "elastic"])
    parser.add_argument("--parts", nargs="+", default=["kill", "fault"], choices=("kill", "fault"))
    parser.add_argument("--lanes", type=int, default=32, help="requests in flight on each engine")
    parser.add_argument("--seconds", type=float, default=8, help="of load before and after")
    parser.add_argument("--timeout", type=float, default=20, help="seconds for one request")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one system's starts")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try it")
    args = parser.parse_args()
    if args.tiny:
        args.systems, args.parts, args.lanes = ["elastic"], ["kill"], 4
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": " ".join(sys.argv)}
    memory = DeviceMemory()
    try:
        with tempfile.TemporaryDirectory(prefix="kvcached-crash-") as name:
            for text in args.systems:
                try:
                    report[text] = run(args, text, Path(name), memory)
                except Exception as error:
                    report[text] = {"error": str(error)[-6000:]}
                    print(text, "failed:", str(error)[-6000:], flush=True)
                args.out.write_text(json.dumps(report) + "\n")
    finally:
        memory.stop()
    return 1 if any("error" in report[text] for text in args.systems) else 0


if __name__ == "__main__":
    raise SystemExit(main())
