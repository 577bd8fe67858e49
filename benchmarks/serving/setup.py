# SPDX-License-Identifier: Apache-2.0
"""What programs that start servers have in common: options, command lines, time limits."""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.tokens_and_throughput import DeviceMemory
from benchmarks.serving.fleet import Plan, compile_cache
from benchmarks.serving.footprint import Paging
from benchmarks.serving.model import SHAPES, make_model
from benchmarks.serving.systems import STARTS, System
from kvcached_core.units import parse_size
from tests.support.engines import ENVIRONMENT

TINY_ARGS = ["--dtype=float32", "--enforce-eager", "--kv-cache-memory-bytes=67108864"]
TINY_SETTINGS = {
    "KVCACHED_CAPACITY": "192MiB",
    "KVCACHED_PAGE_SIZE": "256KiB",
    "KVCACHED_PARKED_DECAY_MS": "500",
}


class OutOfTime(RuntimeError):
    """The whole run's limit is reached."""


class Clock:
    """How much of the limit is left."""

    def __init__(self, limit_s: float) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + limit_s

    def left(self) -> float:
        return self._end - time.monotonic()

    def spent(self) -> float:
        return round(time.monotonic() - self._begin, 1)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all programs that start servers ask for."""
    add = parser.add_argument
    add("--logs", type=Path, help="of the servers; else in --out")
    add(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "kvcached-bench",
        help="models and compiled code, kept from run to run",
    )
    add("--limit", type=float, default=3600, help="seconds for everything")
    add("--start-limit", type=float, default=300, help="seconds to start a system")
    add("--shape", choices=[s for s in SHAPES if s != "tiny"], default="8b")
    add("--start", choices=STARTS, default="", help="else as the system needs")
    add("--max-model-len", type=int, default=8192)
    add("--stream-interval", type=int, default=8)
    add("--prefix-cache", action="store_true", help="with prefix caching")
    add("--shared", type=float, default=0.0, help="part of each prompt that all have in common")
    add("--seed", type=int, default=0)
    engine_args_help = "again for each, e.g. --engine-args=--max-num-seqs=256"
    add("--engine-args", nargs="*", action="extend", default=[], help=engine_args_help)
    add("--tiny", action="store_true", help="tiny models on the CPU, to try it")


def parse_system(text: str) -> System:
    """For argparse."""
    try:
        return System.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def paging_of(args: argparse.Namespace, system: System) -> Paging | None:
    """How an elastic system's blocks lie on its pages; None of others, or where not known."""
    size = TINY_SETTINGS["KVCACHED_PAGE_SIZE"] if args.tiny else "16MiB"
    size = system.settings.get("page_size", size)
    if system.kind != "elastic":
        return None
    # The shape's own figure is of float32.
    token = SHAPES["tiny" if args.tiny else args.shape].kv_bytes_per_token
    return Paging(token if args.tiny else token // 2, parse_size(size))


def server_args(args: argparse.Namespace, system: System) -> list[str]:
    """The command line that all systems have, and the system's part of the GPU."""
    common = [
        f"--max-model-len={args.max_model_len}",
        f"--stream-interval={args.stream_interval}",
        "--load-format=dummy",
        f"--{'' if args.prefix_cache else 'no-'}enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    if args.tiny:
        return [*common, *TINY_ARGS, *args.engine_args]
    return [*common, "--dtype=bfloat16", *system.share(args.models), *args.engine_args]


def plan_for(
    args: argparse.Namespace, system: System, folder: Path, left_s: float, turn: str = ""
) -> Plan:
    """Of a system's servers; `turn` tells two starts of one system apart."""
    logs = (args.logs or args.out / "logs") / (re.sub("[:=]", "_", system.text) + turn)
    logs.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()  # servers run elsewhere
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env |= compile_cache(work / "compiled")
    if args.runner:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
    if args.tiny:
        env |= ENVIRONMENT | (TINY_SETTINGS if system.kind == "elastic" else {})
    return Plan(
        system,
        make_model(work, "tiny" if args.tiny else args.shape),
        server_args(args, system),
        env,
        logs,
        folder / "ledger",
        fixed=args.tiny,
        deadline=time.monotonic() + min(args.start_limit, left_s),
        start=args.start,
    )


def wait_for_memory(memory: DeviceMemory, empty_mib: int, limit_s: float = 20.0) -> int:
    """MiB in use once the servers of the system before have given theirs back."""
    end = time.monotonic() + limit_s
    while memory.used() >> 20 > empty_mib + 200 and time.monotonic() < end:
        time.sleep(0.2)
    return memory.used() >> 20
