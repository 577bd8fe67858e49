# SPDX-License-Identifier: Apache-2.0
"""What a step of a real vLLM engine costs its scheduler on the CPU, unpatched and elastic.

    ENGINE_STOCK=... ENGINE_PATCHED=... python benchmarks/schedule_cost.py --batch 1 64 256
    python benchmarks/schedule_cost.py --batch 1 --shape 1b  # on a GPU

A tiny model on the CPU, or one of a real shape on a GPU, in one process; so many requests that
decode together. CPU time of the thread in `Scheduler.schedule` and in what is told to metrics, and
the time from step to step, of the fastest tenth, the middle and the mean of all steps: neighbours
on the machine count little. Each engine is a process of its own, and they take turns. With `--full`
all memory is full of cached prefixes, and every block comes out of these.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.serving.model import SHAPES, make_model
from tests.support.engines import engine_environment

TIMED = ("schedule", "make_stats")
ROUNDS = 3
PROMPT = 48
BLOCK = 16


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function, which notes the microseconds of CPU time it takes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time_ns()
        result = function(*args, **kwargs)
        spent.append((time.thread_time_ns() - begin) / 1e3)
        return result

    return call


def new_tokens(batch: int) -> int:
    """Of each request."""
    return max(40, 400 // batch)


def block_bytes(shape: str) -> int:
    """Of the KV cache; a shape's own figure is of float32."""
    return BLOCK * SHAPES[shape].kv_bytes_per_token // (1 if shape == "tiny" else 2)


def two_rounds(batch: int, shape: str) -> int:
    """Bytes of the KV cache that so many take."""
    return 2 * batch * -(-(PROMPT + new_tokens(batch)) // BLOCK) * block_bytes(shape)


def noting_starts(function: Callable[..., Any], gaps: list[float]) -> Callable[..., Any]:
    """The function, which notes the microseconds since its last call."""
    last = math.nan

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        before, last = last, time.perf_counter()
        if last > before:
            gaps.append((last - before) * 1e6)
        return function(*args, **kwargs)

    return call


def measure(
    model: str, batch: int, kv_bytes: int, prefix_cache: bool, full: bool
) -> dict[str, Any]:
    """In the engine that this process imports."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.v1.core.sched.scheduler import Scheduler

    spent: dict[str, list[float]] = {name: [] for name in (*TIMED, "step")}
    for name in TIMED:
        setattr(Scheduler, name, timed(getattr(Scheduler, name), spent[name]))
    schedule = noting_starts(Scheduler.schedule, spent["step"])
    Scheduler.schedule = schedule
    tiny = Path(model).name == "tiny"
    llm = LLM(
        model,
        dtype="float32" if tiny else "bfloat16",
        load_format="dummy",
        enforce_eager=tiny,
        max_model_len=4096,
        max_num_seqs=256,
        block_size=BLOCK,
        kv_cache_memory_bytes=kv_bytes,
        enable_prefix_caching=prefix_cache,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens(batch), ignore_eos=True)
    before = 3 if full else 1
    for number in range(before + ROUNDS):
        if number == before:
            for times in spent.values():
                times.clear()
        first = 7 + number if full else 7
        prompts = [
            TokensPrompt(prompt_token_ids=[first, *[7 + i] * (PROMPT - 1)]) for i in range(batch)
        ]
        llm.generate(prompts, sampling, use_tqdm=False)
    return {
        name: {
            "steps": len(times),
            "fastest_tenth_us": round(statistics.quantiles(times, n=10)[0], 1),
            "median_us": round(statistics.median(times), 1),
            "mean_us": round(statistics.mean(times), 1),
        }
        for name, times in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="all but tiny need a GPU")
    parser.add_argument("--repeats", type=int, default=2, help="of each engine, in turns")
    parser.add_argument("--prefix-cache", action="store_true")
    parser.add_argument("--full", action="store_true", help="of cached prefixes")
    parser.add_argument("--kv-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--here", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        (batch,), flags = args.batch, (args.prefix_cache, args.full)
        print(json.dumps(measure(args.here, batch, args.kv_bytes, *flags)))
        return
    args.prefix_cache |= args.full
    tiny = args.shape == "tiny"
    with tempfile.TemporaryDirectory(prefix="kvcached-schedule-") as name:
        model = make_model(Path(name), args.shape)
        elastic = {
            "ENABLE_KVCACHED": "true",
            "KVCACHED_NAME": "engine",
            "KVCACHED_LEDGER_DIR": str(Path(name) / "ledger"),
        }
        if tiny:
            elastic |= {"KVCACHED_CAPACITY": "2GiB", "KVCACHED_PAGE_SIZE": "2MiB"}
        for batch in args.batch:
            has = virtual = (512 << 20) if tiny else 4 * two_rounds(batch, args.shape)
            if args.full:
                has = two_rounds(batch, args.shape)
                virtual = 2 * has  # as if others had the other half
                elastic["KVCACHED_LIMIT"] = str(has)
                if tiny:
                    elastic["KVCACHED_PAGE_SIZE"] = str(8 * block_bytes(args.shape))
            for _ in range(args.repeats):
                for flavor, settings in (("stock", {}), ("patched", elastic)):
                    # What makes a CPU engine's answers the same would stop a GPU's compiler.
                    env = engine_environment(flavor, settings, fixed=tiny)  # type: ignore[arg-type]
                    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
                    command = [sys.executable, __file__, "--here", str(model)]
                    kv_bytes = virtual if settings else has
                    command += ["--batch", str(batch), "--kv-bytes", str(kv_bytes)]
                    command += ["--prefix-cache"] if args.prefix_cache else []
                    command += ["--full"] if args.full else []
                    done = subprocess.run(
                        command, env=os.environ | env, capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        sys.exit(f"the {flavor} engine failed:\n{done.stderr[-4000:]}")
                    found = json.loads(done.stdout.splitlines()[-1])
                    print(json.dumps({"engine": flavor, "batch": batch} | found), flush=True)


if __name__ == "__main__":
    main()
