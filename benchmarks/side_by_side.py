# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark at the same time for several systems, each on GPUs and cores of its own.

    python benchmarks/side_by_side.py --hold 62212 --out build/peers \
        --systems elastic-mps static-mps:kv_cache=6.9GiB -- \
        benchmarks/latency_benefit.py run --start stagger --patterns stag:24 over:24 stag:40

What follows `--` is run once for each system, which it is told as `--systems`. A folder in `--out`
has each one's results and output; in the end the results of all are put together. One MPS daemon
serves all of them. With `--hold` so many MiB of each GPU are taken first (`gpu/hold_memory.py`).
GPUs and cores are those that this process may use (`CUDA_VISIBLE_DEVICES`, `taskset`).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from kvcached_core.mps import Mps

HOLD = Path(__file__).parent / "gpu" / "hold_memory.py"
HOLD_S = 120.0


def parts(cores: Sequence[int], count: int) -> list[list[int]]:
    """As many equal shares of the cores, or all of them for each if there are too few."""
    size = len(cores) // count
    return [list(cores[i * size : (i + 1) * size]) or list(cores) for i in range(count)]


def gpus_of(index: int, count: int, visible: str) -> list[str]:
    """The GPUs of one system.

    Args:
        index: of the system.
        count: GPUs of each system.
        visible: `CUDA_VISIBLE_DEVICES`, empty for all there are.

    Raises:
        SystemExit: so many are not visible.
    """
    ours = range(index * count, (index + 1) * count)
    names = visible.split(",") if visible else [str(gpu) for gpu in range(ours.stop)]
    if len(names) < ours.stop:
        raise SystemExit(f"CUDA_VISIBLE_DEVICES={visible} has fewer than {ours.stop} GPUs")
    return [names[gpu] for gpu in ours]


@contextmanager
def process(
    command: Sequence[str], env: dict[str, str], cores: Sequence[int], output: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The command at work on these cores; it is told to end when the context is left."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the child's from its first instruction on
    try:
        with output.open("ab") as file:
            child = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    finally:
        os.sched_setaffinity(0, allowed)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        child.wait()


@contextmanager
def mps_for_all(systems: Sequence[str]) -> Iterator[None]:
    """The daemon, so that none of the runs starts it and ends it under the others."""
    mps = Mps()
    ours = any(s.partition(":")[0].endswith("-mps") for s in systems) and mps.pid() is None
    if ours:
        mps.start()
    try:
        yield
    finally:
        if ours:
            mps.stop(force=True)


def wait_until_held(path: Path, child: subprocess.Popen[bytes]) -> None:
    """Until `hold_memory.py` says that it has the memory.

    Raises:
        RuntimeError: the process ended first, or takes too long.
    """
    end = time.monotonic() + HOLD_S
    while b"MiB in use" not in path.read_bytes():
        if child.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"memory was not taken: {path.read_text()}")
        time.sleep(0.1)


def put_together(out: Path) -> list[str]:
    """Write into one file what each folder has in a file of that name; the names.

    Earlier runs' folders are among them, so that nothing is lost or there twice.
    """
    names = sorted({path.name for path in out.glob("*/*.jsonl")})
    for name in names:
        with (out / name).open("wb") as file:
            for path in sorted(out.glob(f"*/{name}")):
                file.write(path.read_bytes())
    return names


def main() -> int:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--systems", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("build/side-by-side"))
    work = Path(tempfile.gettempdir()) / "kvcached-bench"
    parser.add_argument("--work", type=Path, default=work, help="a folder in it for each system")
    parser.add_argument("--gpus", type=int, default=1, help="of each system")
    parser.add_argument("--hold", type=int, default=0, metavar="MIB", help="of each GPU")
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT ...")
    args = parser.parse_args()
    # Ended from outside, the runs must end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cores = parts(sorted(os.sched_getaffinity(0)), len(args.systems))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [gpus_of(index, args.gpus, visible) for index in range(len(args.systems))]
    lanes = [args.out / re.sub("[:=]", "_", system) for system in args.systems]
    with mps_for_all(args.systems), ExitStack() as stack:
        children = []
        for index, (system, lane) in enumerate(zip(args.systems, lanes, strict=True)):
            lane.mkdir(parents=True, exist_ok=True)
            env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index])}
            for gpu in gpus[index] if args.hold else ():
                command = [sys.executable, str(HOLD), str(args.hold)]
                taken = lane / f"held-{gpu}.log"
                taken.write_bytes(b"")
                one = env | {"CUDA_VISIBLE_DEVICES": gpu}
                holder = stack.enter_context(process(command, one, cores[index], taken))
                wait_until_held(taken, holder)
            command = [sys.executable, *args.command, "--systems", system]
            command += ["--out", str(lane), "--work", str(args.work / str(index))]
            log = lane / "output.log"
            children.append(stack.enter_context(process(command, env, cores[index], log)))
        codes = [child.wait() for child in children]
    for system, lane, code in zip(args.systems, lanes, codes, strict=True):
        print(f"{system} ended with {code}: {lane / 'output.log'}")
    print(f"{', '.join(put_together(args.out))} in {args.out}")
    return max(map(abs, codes))


if __name__ == "__main__":
    raise SystemExit(main())
