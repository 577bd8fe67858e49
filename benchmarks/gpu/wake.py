# SPDX-License-Identifier: Apache-2.0
"""How fast a sleeping server of an 8B shape answers: the engine's own sleep mode against ours.

    ENGINE_STOCK=... ENGINE_PATCHED=... python benchmarks/gpu/wake.py --out build/wake.json

One server after the other, each with `--enable-sleep-mode` and dummy weights. A cycle is a sleep of
level 1, then at the same moment a wake and a request. At the end two of ours with one model sleep
on one copy of the weights. Without a GPU, `--tiny` runs ours alone on the CPU, to try the script.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.many_engines import come_up
from benchmarks.gpu.tokens_and_throughput import LLAMA_8B, DeviceMemory
from kvcached_core import Ledger
from kvcached_core.sleep.host_file import sweep
from tests.support.prompts import equal_prompts
from tests.support.server import Server
from tests.support.tiny_model import LLAMA, TinySpec, make_tiny_model

GIB = 1 << 30
TOKENS = 16
ARGS = ["--load-format=dummy", "--enable-sleep-mode", "--max-num-seqs=64"]


def weight_bytes(spec: TinySpec, item: int) -> int:
    """Of a Llama of this shape, whose head is not its embedding."""
    attention = spec.hidden * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    layer = attention + 3 * spec.hidden * spec.intermediate + 2 * spec.hidden
    return item * (spec.layers * layer + 2 * spec.vocab * spec.hidden + spec.hidden)


class Asked(threading.Thread):
    """One streamed request; when its first token came, and all of them with their scores."""

    def __init__(self, server: Server, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._prompt = prompt
        self.first_s = 0.0
        self.tokens: list[int] = []
        self.scores: list[float] = []
        self.error = ""

    def run(self) -> None:
        path, body = self._server.request(self._prompt, TOKENS)
        body |= {"stream": True, "logprobs": 0}
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=120)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            self.error = response.read().decode()[:500]
            return
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            if choice.get("token_ids"):
                self.first_s = self.first_s or time.perf_counter() - begin
                self.tokens += choice["token_ids"]
                self.scores += choice["logprobs"]["token_logprobs"]
        connection.close()


def ask(server: Server, prompt: list[int]) -> Asked:
    asked = Asked(server, prompt)
    asked.start()
    asked.join()
    return asked


def post(server: Server, path: str) -> float:
    """Seconds it took."""
    begin = time.perf_counter()
    status, text = server.post(path, {}, timeout_s=120)
    if status != 200:
        raise RuntimeError(f"{path}: {status} {text}")
    return time.perf_counter() - begin


def cycle(server: Server, prompt: list[int], memory: DeviceMemory) -> dict[str, Any]:
    sleep_s = post(server, "/sleep?level=1")
    time.sleep(0.5)
    asleep = memory.used()
    asked = Asked(server, prompt)
    asked.start()
    wake_s = post(server, "/wake_up")
    asked.join()
    return {
        "sleep_s": round(sleep_s, 4),
        "wake_s": round(wake_s, 4),
        "first_token_s": round(asked.first_s, 4),
        "asleep_mib": asleep >> 20,
        "tokens": asked.tokens,
        "scores": asked.scores,
        "error": asked.error,
    }


def run(server: Server, args: Any, weights: int, memory: DeviceMemory) -> dict[str, Any]:
    """All cycles of one server that is up."""
    prompt = equal_prompts(1, args.prompt, 3)[0]
    # Not from the prefix cache, which is empty after a wake: neither may be what this compares to.
    post(server, "/reset_prefix_cache")
    warm = [ask(server, prompt)]
    post(server, "/reset_prefix_cache")
    warm.append(ask(server, prompt))
    expected = warm[-1]
    awake = memory.used()
    cycles = []
    for number in range(args.cycles):
        cycles.append(cycle(server, prompt, memory))
        if number in (0, args.cycles - 1):
            print(server.name, {k: v for k, v in cycles[-1].items() if k != "scores"}, flush=True)
    return {
        "weights_gib": round(weights / GIB, 3),
        "awake_mib": awake >> 20,
        "awake_after_mib": memory.used() >> 20,
        "first_token_never_slept_s": round(expected.first_s, 4),
        "tokens_equal": all(c["tokens"] == expected.tokens for c in cycles),
        # Dummy weights repeat tokens; their scores differ if a byte of the weights does.
        "worst_score_difference": max(
            (abs(a - b) for c in cycles for a, b in zip(c["scores"], expected.scores, strict=True)),
            default=None,
        ),
        "errors": sorted({c["error"] for c in cycles if c["error"]}),
        **{
            name: {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for name in ("sleep_s", "wake_s", "first_token_s", "asleep_mib")
            for values in [[c[name] for c in cycles]]
        },
        # The wake of ours returns while the copies run: to the first token is what both have.
        "gib_per_s_to_first_token": round(
            weights / GIB / statistics.median(c["first_token_s"] for c in cycles), 1
        ),
        "gib_per_s_of_wake": round(
            weights / GIB / statistics.median(c["wake_s"] for c in cycles), 1
        ),
        "cycles": [{k: v for k, v in c.items() if k != "scores"} for c in cycles],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/wake.json"))
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts sooner")
    parser.add_argument("--systems", nargs="+", default=["stock", "ours", "ours-two"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try it")
    args = parser.parse_args()
    # Ended from outside, the servers must end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spec, dtype = (LLAMA, "float32") if args.tiny else (LLAMA_8B, "bfloat16")
    weights = weight_bytes(spec, 4 if args.tiny else 2)
    memory = DeviceMemory()
    report: dict[str, Any] = {"command": " ".join(sys.argv), "empty_mib": memory.used() >> 20}
    with tempfile.TemporaryDirectory(prefix="kvcached-wake-") as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model", spec, weights=False)
        engine = [*ARGS, f"--dtype={dtype}", f"--max-model-len={spec.max_len}"]
        engine += ["--enforce-eager"] if args.eager or args.tiny else []
        ours = {"ENABLE_KVCACHED": "true", "KVCACHED_LEDGER_DIR": str(folder / "ledger")}
        if args.tiny:
            ours |= {"KVCACHED_CAPACITY": "64MiB", "KVCACHED_PAGE_SIZE": "256KiB"}
        else:
            # Where memory is shared between processes: the disk would not keep up.
            ours["KVCACHED_WEIGHTS_DIR"] = "/dev/shm/kvcached-wake"

        def server(kind: str, name: str) -> Server:
            env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
            env |= ours | {"KVCACHED_NAME": name} if kind == "patched" else {}
            return Server(name, model, folder, engine, env, kind, fixed=args.tiny)  # type: ignore[arg-type]

        for system in args.systems:
            if args.tiny and system == "stock":
                continue
            with ExitStack() as stack:
                kind = "stock" if system == "stock" else "patched"
                if system != "ours-two":
                    first = server(kind, system)
                    stack.callback(first.stop)
                    if not come_up([first]):
                        return 1
                    report[system] = run(first, args, weights, memory)
                else:
                    report[system] = two(server, stack, args, memory, folder)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report) + "\n")
    sweep(Path("/dev/shm/kvcached-wake"))  # of servers that had to be killed
    memory.stop()
    for system in args.systems:
        if system in report:
            print(system, {k: v for k, v in report[system].items() if k != "cycles"}, flush=True)
    return 0


def two(
    server: Any, stack: ExitStack, args: Any, memory: DeviceMemory, folder: Path
) -> dict[str, Any]:
    """Two engines of one model that wake in turn: one copy on the host."""
    servers = [server("patched", name) for name in ("one", "two")]
    for each in servers:
        stack.callback(each.stop)
        if not come_up([each]):
            raise RuntimeError(each.output()[-3000:])
        post(each, "/sleep?level=1")
    (path,) = (folder / "ledger").glob("*.ledger")
    weights = Path("/dev/shm/kvcached-wake")
    if args.tiny:
        from kvcached_core.config import default_disk_dir

        weights = default_disk_dir() / "weights"
    copies = {p.name: p.stat().st_size >> 20 for p in weights.iterdir()}
    asleep = memory.used() >> 20
    prompt = equal_prompts(1, args.prompt, 3)[0]
    turns, answers = [], []
    for turn in range(6):
        each = servers[turn % 2]
        asked = Asked(each, prompt)
        asked.start()
        wake_s = post(each, "/wake_up")
        asked.join()
        turns.append({"wake_s": round(wake_s, 4), "first_token_s": round(asked.first_s, 4)})
        answers.append(asked.tokens)
        post(each, "/sleep?level=1")
    return {
        "copies_mib": copies,
        "both_asleep_mib": asleep,
        "static_asleep_mib": {m.name: m.static_bytes >> 20 for m in Ledger(path).members()},
        "turns": turns,
        "tokens_equal": all(answer and answer == answers[0] for answer in answers),
    }


if __name__ == "__main__":
    raise SystemExit(main())
