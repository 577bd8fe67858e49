# SPDX-License-Identifier: Apache-2.0
"""A vLLM and an SGLang server with 8B shapes on one GPU, under bursts in turn and at once.

    ENGINE_PATCHED=... PYTHONPATH=... SGLANG_PYTHONPATH=... \
        python benchmarks/gpu/vllm_beside_sglang.py --out build/beside.json

PYTHONPATH is vLLM's and this program's, SGLANG_PYTHONPATH the other server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.many_engines import Sampler, come_up
from benchmarks.gpu.tokens_and_throughput import LLAMA_8B, DeviceMemory
from kvcached_core import Ledger
from tests.support.prompts import equal_prompts
from tests.support.server import Answer, HttpServer, Server, burst_async
from tests.support.sglang_server import SglangServer
from tests.support.tiny_model import LLAMA, make_tiny_model

VLLM = ["--load-format=dummy", "--max-num-seqs=256", "--max-model-len=8192", "--enforce-eager"]
SGLANG = ["--load-format=dummy", "--context-length=8192", "--log-level-http=warning"]
GPU = ["--attention-backend=triton", "--sampling-backend=pytorch", "--cuda-graph-max-bs-decode=64"]
GPU += ["--disable-prefill-cuda-graph"]


class GpuSglang(SglangServer):
    """An SGLang server as a user starts it."""

    def __init__(self, model: Path, folder: Path, args: Sequence[str], env: dict[str, str]) -> None:
        env = os.environ | env | {"PYTHONPATH": os.environ["SGLANG_PYTHONPATH"]}
        HttpServer.__init__(self, "sglang", model, folder, args, env)
        self._host = None


def at_once(servers: Sequence[HttpServer], args: Any, seed: int) -> list[list[Answer]]:
    async def run() -> list[list[Answer]]:
        prompts = equal_prompts(args.burst, args.prompt, seed)
        bursts = (burst_async(server, prompts, args.answer) for server in servers)
        return list(await asyncio.gather(*bursts))

    return asyncio.run(run())


def phase(
    names: Sequence[str], servers: dict[str, HttpServer], path: Path, memory: Any, args: Any
) -> dict[str, Any]:
    """A burst to each of the named servers, all at the same time."""
    before = {m.name: m.counters["reclaimed_bytes"] for m in Ledger(path).members()}
    memory.take_peak()
    begin = time.monotonic()
    with Sampler(path) as sampler:
        answers = at_once([servers[name] for name in names], args, seed=7)
    rows = [row for _, row in sampler.rows]
    return {
        "bursts_to": list(names),
        "seconds": round(time.monotonic() - begin, 2),
        "answered": sum(len(a.tokens) == args.answer for burst in answers for a in burst),
        "sent": args.burst * len(names),
        "errors": sorted({a.error[:200] for burst in answers for a in burst if a.error})[:3],
        "peak_committed_mib": {n: max(r[n].committed for r in rows) >> 20 for n in servers},
        "peak_leased_mib": max(sum(m.leased for m in r.values()) for r in rows) >> 20,
        "reclaimed_mib": {
            m.name: (m.counters["reclaimed_bytes"] - before[m.name]) >> 20
            for m in Ledger(path).members()
        },
        "preemptions": {m.name: m.counters["preemptions"] for m in Ledger(path).members()},
        "device_peak_mib": memory.take_peak() >> 20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/beside.json"))
    parser.add_argument("--burst", type=int, default=240, help="prompts of a burst")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try it")
    args = parser.parse_args()
    spec, dtype = (LLAMA, "float32") if args.tiny else (LLAMA_8B, "bfloat16")
    memory = DeviceMemory()
    report: dict[str, Any] = {"command": " ".join(sys.argv), "phases": []}
    with tempfile.TemporaryDirectory(prefix="kvcached-beside-") as name, ExitStack() as stack:
        folder = Path(name)
        model = make_tiny_model(folder / "model", spec, weights=False)
        env = {"ENABLE_KVCACHED": "true", "KVCACHED_LEDGER_DIR": str(folder / "ledger")}
        vllm, sglang = [*VLLM, f"--dtype={dtype}"], [*SGLANG, f"--dtype={dtype}"]
        if args.tiny:
            env |= {"KVCACHED_CAPACITY": "48MiB", "KVCACHED_PAGE_SIZE": "256KiB"}
            env |= {"SGLANG_USE_CPU_ENGINE": "1"}
            vllm[2] = f"--max-model-len={spec.max_len}"
            sglang[1] = f"--context-length={spec.max_len}"
            sglang.append("--device=cpu")
        else:
            sglang += GPU
        names = {name: env | {"KVCACHED_NAME": name} for name in ("vllm", "sglang")}
        servers: dict[str, HttpServer] = {
            "vllm": Server("vllm", model, folder, vllm, names["vllm"], fixed=args.tiny),
            "sglang": GpuSglang(model, folder, sglang, names["sglang"]),
        }
        for server in servers.values():
            stack.callback(server.stop)
            if not come_up([server]):
                return 1
        (path,) = (folder / "ledger").glob("*.ledger")
        report["idle_device_mib"] = memory.used() >> 20
        report["available_mib"] = Ledger(path).available() >> 20
        both = ("vllm", "sglang")
        for turn in (("vllm",), ("sglang",), ("vllm",), ("sglang",), both, both):
            report["phases"].append(phase(turn, servers, path, memory, args))
            print(json.dumps(report["phases"][-1]), flush=True)
        time.sleep(4)
        report["after_device_mib"] = memory.used() >> 20
        report["after"] = {m.name: m.committed >> 20 for m in Ledger(path).members()}
        report["alive"] = {name: server.code is None for name, server in servers.items()}
        report["events"] = [f"{e.kind} {e.name} {e.bytes}" for e in Ledger(path).events()][-20:]
        for server in servers.values():
            if server.code is not None or "Traceback" in server.output():
                print(server.name, server.output()[-3000:])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report) + "\n")
    memory.stop()
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
