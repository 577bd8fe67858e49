# SPDX-License-Identifier: Apache-2.0
"""More models than a GPU holds, behind the router: bursts to each in turn, asleep in between.

    ENGINE_PATCHED=... PYTHONPATH=... python benchmarks/many_models.py --out build/many-models

The router launches the engines, one after the other, and puts each to sleep. Then every model has a
few seconds with requests now and then (the pattern `burst`, benchmarks/serving/patterns.py): the
first request of a burst wakes it, for which others must have fallen asleep or be idle. Reported are
the times to first token, those of requests that woke a model apart, and every model's wakes.
`--sleep cold` ends engines instead of putting them to sleep, `--sleep never` keeps all awake. With
`--fault` a further client of the same MPS server then writes to an address that is not there, which
ends every engine, and each model is asked at once: how long until the router has started it anew?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.tokens_and_throughput import DeviceMemory
from benchmarks.serving import stats
from benchmarks.serving.client import Job, Run, Sent, play
from benchmarks.serving.fleet import compile_cache, names, raise_file_limit
from benchmarks.serving.model import SHAPES, make_model
from benchmarks.serving.observe import LedgerWatch
from benchmarks.serving.patterns import Lengths, parse
from benchmarks.serving.setup import TINY_ARGS
from kvcached_core.config import Config
from kvcached_core.mps import Mps, client_environment, default_directory
from kvcached_core.sleep.host_file import sweep
from tests.support.engines import ENVIRONMENT, engine_environment
from tests.support.server import free_port

REPO = Path(__file__).resolve().parents[1]
WEIGHTS = Path("/dev/shm/kvcached-many-models")
WOKE_S = 1.0
"""A request that came so soon after its model began to wake is one of those that waited for it."""


class Router:
    """The router as a process, with the engines it launches."""

    def __init__(self, args: argparse.Namespace, folder: Path, model: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder, self._out = folder, args.out
        self.environment = engine_environment("patched", fixed=False) | compile_cache(
            args.work / "compiled"
        )
        self.environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self.environment |= ENVIRONMENT if args.tiny else {}
        settings = {
            "listen": self.url.removeprefix("http://"),
            "ledger_dir": str(folder / "ledger"),
            "gpus": {
                0: {"mps": "auto", "max_running": 1024, "parallel_starts": args.parallel_starts}
            },
            "models": [self._model(args, name, model) for name in names(args.models)],
        }
        (folder / "router.yaml").write_text(json.dumps(settings))

    def _model(self, args: argparse.Namespace, name: str, model: Path) -> dict[str, Any]:
        longest = 4096 if args.tiny else 8192
        words = [f"--max-model-len={longest}", "--stream-interval=8", "--load-format=dummy"]
        words += TINY_ARGS if args.tiny else ["--dtype=bfloat16", f"--max-num-seqs={args.seqs}"]
        env = {
            "ENABLE_KVCACHED": "true",
            "KVCACHED_NAME": name,
            "KVCACHED_LEDGER_DIR": str(self._folder / "ledger"),
        }
        if args.tiny:
            env |= {"KVCACHED_CAPACITY": "96MiB", "KVCACHED_PAGE_SIZE": "256KiB"}
        else:
            # In memory, as beside an ordinary ledger; this one is in a temporary folder.
            env["KVCACHED_WEIGHTS_DIR"] = str(WEIGHTS)
        launch = {
            "port": free_port(),
            "model": str(model),
            "args": [*words, *args.engine_args],
            "env": env,
            "log": str(self._out / f"{name}.log"),
        }
        found: dict[str, Any] = {
            "name": name,
            "ttft": args.objective,
            "queue": {"timeout": "5m", "max_waiting": 4096},
            "replicas": [{"gpu": "0", "launch": launch}],
        }
        if args.sleep != "never":
            found["sleep"] = {"kind": args.sleep, "at_start": True, "after": args.after}
        return found

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        command = [sys.executable, "-m", "kvcached_core.cli.router", "serve"]
        command.append(str(self._folder / "router.yaml"))
        with (self._out / "router.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=REPO, stdout=log, stderr=log, env=self.environment
            )
        try:
            yield
        finally:
            process.terminate()
            process.wait(timeout=120)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def ask(self, model: str, limit_s: float) -> dict[str, Any]:
        """One short request: what came of it, and after how long."""
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begin, said = time.monotonic(), ""
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as answer:
                status, text = answer.status, json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            status, text, said = error.code, "", error.read().decode()[:300]
        except OSError as error:
            status, text, said = 0, "", repr(error)
        spent = round(time.monotonic() - begin, 2)
        return {"status": status, "seconds": spent, "text": text, "error": said}

    def wait(self, state: str, limit_s: float) -> dict[str, float]:
        """Until all models are in this state; when each was, in seconds from now.

        Raises:
            TimeoutError: they were not in time.
        """
        begin = time.monotonic()
        found: dict[str, float] = {}
        while True:
            states: dict[str, str] = {}
            with contextlib.suppress(OSError):
                models = self.get("/models")["models"]
                states = {name: model["state"] for name, model in models.items()}
            spent = time.monotonic() - begin
            found |= {
                n: round(spent, 1) for n, s in states.items() if s == state and n not in found
            }
            if states and len(found) == len(states):
                return found
            if spent > limit_s:
                raise TimeoutError(f"after {limit_s:.0f} s the models are {states}")
            time.sleep(0.1)


def waking(rows: list[Sent], gap_s: float) -> list[Sent]:
    """The requests that found their model asleep: the first after a pause, and those soon after."""
    found, last, woke = [], float("-inf"), float("-inf")
    for row in sorted(rows, key=lambda row: row.due):
        if row.due - last > gap_s:
            woke = row.due
        if row.due - woke < WOKE_S:
            found.append(row)
        last = max(last, row.last if not row.error else row.due)
    return found


def fault(args: argparse.Namespace, router: Router) -> dict[str, Any]:
    """Ends all engines by a fault of another client; what each model answers before and after."""
    models = names(args.models)

    def ask_all(limit_s: float) -> dict[str, Any]:
        with ThreadPoolExecutor(len(models)) as pool:
            asked = pool.map(lambda model: router.ask(model, limit_s), models)
            return dict(zip(models, asked, strict=True))

    before = ask_all(120)
    daemon = default_directory(router.environment)
    if Mps(daemon).pid() is None:
        raise RuntimeError(f"the router's engines are no clients of MPS: no daemon at {daemon}")
    culprit = subprocess.run(
        [sys.executable, str(REPO / "benchmarks/gpu/fatal_fault.py")],
        env=os.environ | client_environment(Config(), daemon),
        input="now\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found: dict[str, Any] = {"before": before, "culprit": culprit.stdout.splitlines()[-1:]}
    found["at_once"] = ask_all(args.drain)
    begin = time.monotonic()
    found["all_asleep_after_s"] = router.wait("asleep", args.start_limit)
    found["afterwards"] = ask_all(args.drain)
    found["spent_s"] = round(time.monotonic() - begin, 1)
    with urllib.request.urlopen(router.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    wanted = ("mps_faults_total", "engine_crashes_total", "engine_starts_total")
    found["metrics"] = [line for line in lines if any(name in line for name in wanted)]
    same = [before[m]["text"] == found["afterwards"][m]["text"] for m in models]
    return found | {"same_answers": sum(same)}


def report(args: argparse.Namespace, runs: list[Run], router: Router) -> dict[str, Any]:
    rows = [row for run in runs for row in run.rows]
    woke = [row for run in runs for row in waking(run.rows, args.after)]
    status = router.get("/sleep/status") if args.sleep != "never" else {}
    good = [stats.ttft(row) for row in rows if not row.error]
    return {
        "all": stats.requests(rows),
        "woke": stats.requests(woke),
        "within_objective": sum(time_ms <= args.objective * 1000 for time_ms in good),
        "output_tok_s": round(stats.output_rate(runs), 1),
        "models": {
            name: stats.requests(run.rows)
            for name, run in zip(names(args.models), runs, strict=True)
        },
        "sleep_status": status,
        "client": stats.client_lag(runs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/many-models"))
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "tiny"], default="8b")
    parser.add_argument("--pattern", default="burst:8", help="benchmarks/serving/patterns.py")
    parser.add_argument("--sleep", choices=("engine", "cold", "never"), default="engine")
    parser.add_argument("--after", type=float, default=4.0, help="seconds of idleness, then sleep")
    parser.add_argument("--objective", type=float, default=2.0, help="time to first token, s")
    parser.add_argument("--seqs", type=int, default=64, help="requests an engine runs at a time")
    parser.add_argument("--start-limit", type=float, default=420, help="seconds to start them all")
    parser.add_argument("--parallel-starts", type=int, default=1, help="engines starting at a time")
    parser.add_argument("--drain", type=float, default=60, help="seconds after the last request")
    parser.add_argument("--fault", action="store_true", help="end all engines in the end")
    parser.add_argument("--engine-args", nargs="*", action="extend", default=[])
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "kvcached-bench",
        help="models and compiled code, kept from run to run",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try it")
    args = parser.parse_args()
    args.out, args.work = args.out.resolve(), args.work.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_file_limit()
    shape = "tiny" if args.tiny else args.shape
    lengths = Lengths(64, 16) if args.tiny else Lengths()
    pattern = parse(args.pattern, args.models, lengths)
    memory = DeviceMemory()
    with tempfile.TemporaryDirectory(prefix="kvcached-bench-") as name:
        folder = Path(name)
        router = Router(args, folder, make_model(args.work, shape))
        with router.running():
            start_s = router.wait("active" if args.sleep == "never" else "asleep", args.start_limit)
            found: dict[str, Any] = {"command": " ".join(sys.argv), "cores": os.cpu_count()}
            found |= {"start_s": start_s, "asleep_mib": memory.used() >> 20}
            found["mps"] = "launched without MPS" not in (args.out / "router.log").read_text()
            print(json.dumps(found), flush=True)
            memory.take_peak()
            jobs = [
                Job(
                    url=router.url + "/v1/completions",
                    model=model,
                    arrivals=arrivals,
                    out=str(folder / f"client-{model}.json"),
                    seed=index,
                    vocab=SHAPES[shape].vocab,
                    drain_s=args.drain,
                )
                for index, (model, arrivals) in enumerate(
                    zip(names(args.models), pattern.models, strict=True)
                )
            ]
            ledger = folder / "ledger"
            with LedgerWatch(ledger if ledger.exists() else None, memory.used) as watch:
                runs = play(jobs, pattern.seconds + args.drain + 30)
            found |= report(args, runs, router) | {"peak_mib": memory.take_peak() >> 20}
            timeline = watch.timeline.since(runs[0].begin).as_json()
            (args.out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
            if args.fault:
                found["fault"] = fault(args, router)
                print(json.dumps(found["fault"]), flush=True)
    memory.stop()
    sweep(WEIGHTS)  # of engines that had to be killed
    (args.out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "timeline.json").write_text(json.dumps(timeline) + "\n")
    brief = {key: found[key] for key in ("start_s", "asleep_mib", "peak_mib", "within_objective")}
    print(json.dumps(brief | {"all": found["all"], "woke": found["woke"]}, indent=1))
    return int(found["all"]["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
