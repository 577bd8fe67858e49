# SPDX-License-Identifier: Apache-2.0
"""A training loop beside engines, on the same memory: it grows and shrinks with its phases.

    python -m benchmarks.train_beside --peak 10GiB --phases 20 --seconds 5        # on a GPU
    python -m benchmarks.train_beside --device cpu --capacity 48MiB --peak 32MiB  # on the host

Phases alternate between a base size and the peak, which the loop leases first and waits for. It
prints a line of JSON as each phase begins, and the sum of all at the end. SIGTERM ends it early.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from kvcached_core.config import Config
from kvcached_core.reservation import Reservation
from kvcached_core.units import parse_size

_WIDTH = 256
_ROW_BYTES = _WIDTH * 4


class Loop:
    """A small network trained on random rows, of which it keeps as many as it has memory for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[torch.Tensor] = []
        self._net = torch.nn.Sequential(
            torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.GELU(), torch.nn.Linear(_WIDTH, 1)
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._net.parameters(), lr=1e-3)
        self.steps = 0

    def keep(self, num_bytes: int) -> None:
        """Hold that many bytes of data, in place of what was held."""
        self._rows = []
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # or the freed bytes stay this process's
        rows = num_bytes // _ROW_BYTES
        if rows:
            self._rows = [torch.randn(rows, _WIDTH, device=self._device)]

    def step(self) -> None:
        (rows,) = self._rows
        batch = rows[torch.randint(len(rows), (64,), device=self._device)]
        loss = (self._net(batch).squeeze(-1) - batch.mean(-1)).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.steps += 1


def train(args: argparse.Namespace, memory: Reservation, stop: threading.Event) -> dict[str, Any]:
    """Alternate between base and peak until all phases are through, or ``stop`` is set."""
    loop = Loop(torch.device(args.device))
    waits: list[float] = []
    begin = time.monotonic()
    trained = 0.0

    def run(name: str, wait_s: float) -> None:
        nonlocal trained
        print(json.dumps({"phase": name, "bytes": memory.bytes, "wait_s": wait_s}), flush=True)
        since = time.monotonic()
        while not stop.is_set() and time.monotonic() - since < args.seconds:
            loop.step()
        trained += time.monotonic() - since

    # Something to train on at any time: the first phase of all is not waited for in vain.
    with memory.hold(args.base, args.timeout):
        for _ in range(args.phases):
            loop.keep(args.base)
            run("base", 0.0)
            if stop.is_set():
                break
            asked = time.monotonic()
            with memory.hold(args.peak - args.base, args.timeout):
                waits.append(time.monotonic() - asked)
                loop.keep(args.peak)
                run("peak", waits[-1])
                loop.keep(args.base)  # freed before it is given back
        loop.keep(0)
    return {
        "name": memory.name,
        "device": args.device,
        "seconds": time.monotonic() - begin,
        "steps": loop.steps,
        "steps_per_s": loop.steps / trained if trained else 0.0,
        "peaks": len(waits),
        "peak_bytes": args.peak,
        "waits_s": waits,
    }


def _key(args: argparse.Namespace) -> str:
    if args.key is not None:
        return str(args.key)
    if args.device == "cpu":
        return "host-0"
    return f"gpu-GPU-{torch.cuda.get_device_properties(args.device).uuid}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peak", type=parse_size, required=True, help="bytes of a peak phase")
    parser.add_argument("--base", type=parse_size, default=1 << 20, help="bytes between peaks")
    parser.add_argument("--phases", type=int, default=5, help="peaks to go through")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each phase, waits apart")
    parser.add_argument("--timeout", type=float, default=600.0, help="longest wait for memory")
    parser.add_argument("--name", default="trainer", help="as the ledger lists it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ledger-dir", type=Path, help="as KVCACHED_LEDGER_DIR of the engines")
    parser.add_argument("--key", help="of the ledger (default: the device's, or host-0)")
    parser.add_argument("--capacity", type=parse_size, help="host only: as of the engines")
    args = parser.parse_args()
    if not _ROW_BYTES <= args.base <= args.peak:
        parser.error(f"--base must be at least {_ROW_BYTES} and at most --peak")

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    given = {"ledger_dir": args.ledger_dir, "capacity": args.capacity}
    config = Config.load({name: value for name, value in given.items() if value is not None})
    # As CUDA counts it, and so the engines; NVML's total is another.
    total = None if args.device == "cpu" else torch.cuda.mem_get_info(args.device)[1]
    with Reservation(args.name, _key(args), config, capacity=total) as memory:
        print(json.dumps(train(args, memory, stop)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
