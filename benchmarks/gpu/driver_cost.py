# SPDX-License-Identifier: Apache-2.0
"""What the driver alone takes to move pages: the calls in a bare C loop, with no allocator around.

python benchmarks/gpu/driver_cost.py --gib 10 --page-mib 16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def measure(num_bytes: int, page_bytes: int, gpus: int = 1) -> dict[str, float]:
    """Seconds to take `num_bytes` of each GPU from its driver and to give them back, page by page.

    With several GPUs their loops begin at the same moment, as those of an engine's ranks do, and
    the slowest counts.

    Raises:
        subprocess.CalledProcessError: there is no C compiler or no driver; it said why.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = visible if visible != [""] else [str(i) for i in range(gpus)]
    with tempfile.TemporaryDirectory(prefix="kvcached-driver-") as name:
        program = str(Path(name) / "driver_cost")
        subprocess.run(["cc", "-O2", "-o", program, str(SOURCE), "-ldl"], check=True)
        command = [program, str(num_bytes // page_bytes), str(page_bytes)]
        loops = [
            subprocess.Popen(
                command,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": device},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for device in devices[:gpus]
        ]
        for loop in loops:  # while one opens its device, the driver has another wait
            assert loop.stdout is not None
            loop.stdout.readline()
        for loop in loops:
            assert loop.stdin is not None
            with suppress(BrokenPipeError):  # its code tells
                loop.stdin.write("\n")
                loop.stdin.flush()
        said = [loop.communicate()[0] for loop in loops]
    for loop in loops:
        if loop.returncode:
            raise subprocess.CalledProcessError(loop.returncode, command)
    found = [json.loads(line) for line in said]
    return {key: max(one[key] for one in found) for key in found[0]}


BUSY = """
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print("running", flush=True)
while True:
    for _ in range(50):
        a @ a
    torch.cuda.synchronize()
"""


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that keeps the GPU computing."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="The driver's own cost of moving pages.")
    parser.add_argument("--gib", type=float, default=10)
    parser.add_argument("--page-mib", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=1, help="at the same time")
    parser.add_argument("--busy", action="store_true", help="beside a process that computes")
    args = parser.parse_args()
    with busy_neighbour() if args.busy else nullcontext():
        print(json.dumps(measure(int(args.gib * 2**30), args.page_mib << 20, args.gpus)))


if __name__ == "__main__":
    main()
