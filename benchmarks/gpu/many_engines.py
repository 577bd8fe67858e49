# SPDX-License-Identifier: Apache-2.0
"""Three engines with models of 8B shape on one GPU: how fast memory changes hands.

    ENGINE_PATCHED=... PYTHONPATH=... python benchmarks/gpu/many_engines.py --out build/many.json

1. handover: alice fills the memory with prefix cache; then a prompt of 90,000 tokens comes to bob.
   From his first posted demand until alice has given 10 GiB back, and until bob holds them,
   against the driver calls for these pages alone (driver_cost.py, the median of some) in the same
   run. He has answered such a prompt before, so that what he computes with is his already.
   parked: the same, but what alice holds is in no use at all.
2. limit: carol's limit is lowered with kvctl while she is idle and holds prefix cache.
3. training: a process outside the ledger takes and frees memory in steps while bursts come to all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.tokens_and_throughput import LLAMA_8B
from benchmarks.serving.fleet import PROFILED
from kvcached_core import Ledger
from tests.support.prompts import equal_prompts
from tests.support.server import HttpServer, Server, burst, burst_async
from tests.support.tiny_model import LLAMA, make_tiny_model

GIB = 1 << 30
NAMES = ("alice", "bob", "carol")
START_S = 200
DRIVER_LOOPS = 3

TRAINING = """
import sys, time, torch
peak, seconds = float(sys.argv[1]) * 2**30, float(sys.argv[2])
step, end, held, failed, peaks = 512 << 20, time.monotonic() + seconds, [], 0, 0
while time.monotonic() < end:
    try:
        while len(held) * step < peak and time.monotonic() < end:
            held.append(torch.ones(step // 4, device="cuda"))
            held[-1].mul_(2.0)
            time.sleep(0.05)
        peaks += len(held) * step >= peak
    except torch.OutOfMemoryError:
        failed += 1
    time.sleep(1)
    held.clear(); torch.cuda.empty_cache(); time.sleep(0.5)
print(f"{peaks} {failed}")
"""


class Sampler:
    """Samples every member's account as fast as it can."""

    def __init__(self, path: Path) -> None:
        self._ledger = Ledger(path)
        self.rows: list[tuple[float, dict[str, Any]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            members = self._ledger.members()
            self.rows.append((time.monotonic(), {m.name: m for m in members}))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def come_up(servers: Iterable[HttpServer]) -> bool:
    """Starts servers, the next once one has measured its memory; says how long each took."""
    begun: dict[HttpServer, float] = {}
    for server in servers:
        for last in list(begun)[-1:]:
            while PROFILED not in last.output() and last.code is None:
                if time.monotonic() - begun[last] > START_S:
                    break
                time.sleep(0.1)
        begun[server] = time.monotonic()
        server.start()
    for server, begin in begun.items():
        try:
            server.wait_ready(timeout_s=START_S)
        except RuntimeError as error:
            print(error)
            return False
        print(f"{server.name} ready after {time.monotonic() - begin:.1f} s", flush=True)
    return True


def member(ledger: Ledger, name: str) -> Any:
    return next(m for m in ledger.members() if m.name == name)


def forget(server: Server) -> None:
    """Empties its prefix cache; the pages stay with it as far as its `parked` allows."""
    status, said = server.post("/reset_prefix_cache", {}, timeout_s=30)
    if status != 200:
        raise RuntimeError(f"{server.name} did not reset its prefix cache: {status} {said}")
    # A pass sees what has lost its content.
    burst(server, equal_prompts(1, 4, 1), 1)


def handover(
    ledger: Ledger, path: Path, servers: dict[str, Server], args: Any, *, parked: bool = False
) -> dict[str, Any]:
    alice, bob = servers["alice"], servers["bob"]
    want = int(args.gib * GIB)
    forget(bob)
    end = time.monotonic() + 20
    while member(ledger, "bob").leased > want // 10 and time.monotonic() < end:
        time.sleep(0.1)
    seed = 100 if parked else 0
    while ledger.available() > args.free and seed % 100 < 40:
        burst(alice, equal_prompts(args.fill, args.prompt, seed), 1)
        seed += 1
    if parked:
        forget(alice)
    time.sleep(1)
    before = {name: member(ledger, name) for name in ("alice", "bob")}
    with Sampler(path) as sampler:
        # One prompt takes all in one step: with several, bob would compute the first meanwhile.
        failed = at_once(bob, equal_prompts(1, args.bob_prompt, 9999 - parked))
    rows = sampler.rows
    start = next((t for t, row in rows if row["bob"].demand > 0), rows[0][0])
    had = before["alice"].leased
    given = next((t for t, r in rows if had - r["alice"].leased >= want), None)
    had = before["bob"].committed
    held = next((t for t, r in rows if r["bob"].committed - had >= want), None)
    return {
        "alice_leased_before": before["alice"].leased,
        "alice_cached_before": before["alice"].cached,
        "alice_parked_before": before["alice"].parked,
        "given_back_s": None if given is None else given - start,
        "held_by_bob_s": None if held is None else held - start,
        "held_gib_s": None if held is None else round(args.gib / (held - start), 1),
        "bob_peak": max(r["bob"].committed for _, r in rows),
        "failed": failed,
        "samples": len(rows),
        "timeline": timeline(rows, start),
    }


def at_once(server: Server, prompts: list[list[int]]) -> int:
    """Sends all prompts in one request, so that none comes late; returns how many failed."""
    body = {"model": str(server.model), "prompt": prompts, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return len(prompts) - len(json.load(response)["choices"])
    except OSError as error:
        print(error, server.output()[-4000:], sep="\n")
        return len(prompts)


def timeline(rows: list[tuple[float, dict[str, Any]]], start: float) -> list[list[float]]:
    """Milliseconds, then MiB: alice leased, asked, returning; bob leased, committed, demand."""
    lines: list[list[float]] = []
    for t, row in rows:
        a, b = row["alice"], row["bob"]
        values = (a.leased, a.asked, a.returning, b.leased, b.committed, b.demand)
        line = [round((t - start) * 1000, 1), *(value >> 20 for value in values)]
        if -20 < line[0] < 3000 and (not lines or lines[-1][1:] != line[1:]):
            lines.append(line)
    return lines


def limit(ledger: Ledger, path: Path, servers: dict[str, Server], args: Any) -> dict[str, Any]:
    burst(servers["carol"], equal_prompts(args.fill, args.prompt, 777), 1)
    time.sleep(1)
    before = member(ledger, "carol").leased
    command = [sys.executable, "-m", "kvcached_core.cli.kvctl", "limit", "carol"]
    where = ["--ledger-dir", str(path.parent)]
    with Sampler(path) as sampler:
        begin = time.monotonic()
        done = subprocess.run(
            [*command, str(GIB), *where], capture_output=True, text=True, check=False
        )
        acknowledged = time.monotonic()
    asked = next((t for t, r in sampler.rows if r["carol"].limit == GIB), begin)
    below = next((t for t, r in sampler.rows if t > asked and r["carol"].leased <= GIB), None)
    answers = burst(servers["carol"], equal_prompts(8, args.prompt, 778), 8)
    subprocess.run([*command, "none", *where], capture_output=True, check=False)
    return {
        "leased_before": before,
        "kvctl_rc": done.returncode,
        "kvctl_output": (done.stdout + done.stderr)[-300:],
        "seconds_to_effect": None if below is None else below - asked,
        "kvctl_start_to_acknowledged_s": acknowledged - begin,
        "kvctl_start_to_limit_set_s": asked - begin,
        "failed_after": sum(a.status != 200 for a in answers),
    }


def training(ledger: Ledger, servers: dict[str, Server], args: Any) -> dict[str, Any]:
    loop = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(args.gib), str(args.seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    bad = total = 0
    turn = 0
    while loop.poll() is None:

        async def all_at_once(turn: int = turn) -> list[Any]:
            bursts = [
                burst_async(s, equal_prompts(args.burst // 3, args.prompt, 100 * turn + i), 32)
                for i, s in enumerate(servers.values())
            ]
            return [a for answers in await asyncio.gather(*bursts) for a in answers]

        answers = asyncio.run(all_at_once())
        total += len(answers)
        bad += sum(a.status != 200 for a in answers)
        turn += 1
    assert loop.stdout is not None
    peaks, ooms = (int(x) for x in loop.stdout.read().split())
    return {
        "requests": total,
        "failed": bad,
        "servers_alive": sum(s.code is None for s in servers.values()),
        "training_peaks_reached": peaks,
        "training_out_of_memory": ooms,
        "overdraft_events": sum(e.kind == "overdraft" for e in ledger.events()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory that changes hands between three engines.")
    parser.add_argument("--out", type=Path, default=Path("build/many.json"))
    parser.add_argument("--gib", type=float, default=10)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--bob-prompt", type=int, default=90000, help="tokens of the handover's")
    parser.add_argument("--fill", type=int, default=24, help="prompts of a filling burst")
    parser.add_argument("--burst", type=int, default=60, help="prompts of a burst while training")
    parser.add_argument("--free", type=int, default=64 << 20, help="full enough below this")
    parser.add_argument("--seconds", type=float, default=40, help="of training")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of each engine")
    parser.add_argument("--headroom", default="", help="kept free of KV caches, e.g. 64GiB")
    parser.add_argument("--parts", nargs="+", default=["handover", "parked", "limit", "training"])
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try it")
    args = parser.parse_args()
    # Ended from outside, the servers must end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spec = replace(LLAMA if args.tiny else LLAMA_8B, max_len=131072)
    report: dict[str, Any] = {"command": " ".join(sys.argv)}
    options = ["--load-format=dummy", "--max-num-seqs=256"]
    options += ["--dtype=float32" if args.tiny else "--dtype=bfloat16", "--enforce-eager"]
    options.append(f"--tensor-parallel-size={args.tensor_parallel}")
    if not args.tiny:
        cost = [sys.executable, str(Path(__file__).with_name("driver_cost.py"))]
        cost += ["--gib", str(args.gib), "--gpus", str(args.tensor_parallel)]
        for name, flags in (("driver", []), ("driver_beside_a_busy_process", ["--busy"])):
            report[name] = []
            for _ in range(DRIVER_LOOPS):
                done = subprocess.run([*cost, *flags], stdout=subprocess.PIPE, check=True)
                report[name].append(json.loads(done.stdout))
            print(name, report[name], flush=True)
    with tempfile.TemporaryDirectory(prefix="kvcached-many-") as name, ExitStack() as stack:
        folder = Path(name)
        model = make_tiny_model(folder / "model", spec, weights=False)
        servers = {}
        for name in NAMES if {"limit", "training"} & set(args.parts) else NAMES[:2]:
            env = {
                "ENABLE_KVCACHED": "true",
                "KVCACHED_NAME": name,
                "KVCACHED_LEDGER_DIR": str(folder / "ledger"),
                "KVCACHED_HEADROOM": args.headroom or ("0" if args.tiny else "1GiB"),
                # For /reset_prefix_cache.
                "VLLM_SERVER_DEV_MODE": "1",
            }
            if name == "alice":
                env["KVCACHED_PARKED"] = "1TiB"
            if args.tiny:
                env |= {"KVCACHED_CAPACITY": "96MiB", "KVCACHED_PAGE_SIZE": "256KiB"}
                env.setdefault("KVCACHED_PARKED", "0")
            length = max(8192, args.bob_prompt + 64 if name == "bob" else 0)
            size = [f"--max-model-len={length}", f"--max-num-batched-tokens={length}"]
            server = Server(name, model, folder, options + size, env, fixed=args.tiny)
            stack.callback(server.stop)
            servers[name] = server
        if not come_up(servers.values()):
            return 1
        # Ranks of one engine keep equal accounts, each in the ledger of its GPU.
        path = min((folder / "ledger").glob("*.ledger"))
        ledger = Ledger(path)
        print({m.name: (m.static_bytes >> 20, m.leased >> 20) for m in ledger.members()})
        print("available MiB", ledger.available() >> 20, "external", ledger.external >> 20)
        report["available_when_idle"] = ledger.available()
        parts = {
            "handover": lambda: handover(ledger, path, servers, args),
            "parked": lambda: handover(ledger, path, servers, args, parked=True),
            "limit": lambda: limit(ledger, path, servers, args),
            "training": lambda: training(ledger, servers, args),
        }
        if {"handover", "parked"} & set(args.parts):
            at_once(servers["bob"], equal_prompts(1, args.bob_prompt, 7777))
        for part in args.parts:
            report[part] = found = parts[part]()
            held_s, driver = found.get("held_by_bob_s"), report.get("driver")
            if held_s and driver:
                # One gives and the other takes what the driver alone gave and took.
                alone_s = statistics.median(loop["take_s"] + loop["give_s"] for loop in driver)
                found["of_the_drivers_rate"] = alone_s / held_s
            print(part, json.dumps(found), flush=True)
        report["members"] = {
            m.name: {"counters": dict(m.counters), "passed_over": m.passed_over}
            for m in ledger.members()
        }
        report["events"] = [f"{e.kind} {e.name} {e.bytes}" for e in ledger.events()][-40:]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report) + "\n")
        for server in servers.values():
            if server.code is not None:
                print(server.name, "died", server.output()[-2000:])
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
