# SPDX-License-Identifier: Apache-2.0
"""A server beside a training loop on the same memory, either of which takes most of it in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account
from tests.support.engines import engine_environment
from tests.support.load import SteadyLoad
from tests.support.trio import CAPACITY
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.trio"]
pytestmark = [pytest.mark.timeout(600), pytest.mark.alone]

REPO = Path(__file__).resolve().parents[2]
BASE, PEAK = 2 * MIB, 32 * MIB
SERVER_PEAK = 30 * MIB
PEAKS = 3
MOST_WAIT_S = 20.0


class Training:
    """The example of `benchmarks/`, as anybody would start it."""

    def __init__(self, cluster: Cluster) -> None:
        command = [sys.executable, "-m", "benchmarks.train_beside", "--device", "cpu"]
        command += ["--ledger-dir", str(cluster.path.parent), "--capacity", str(CAPACITY)]
        command += ["--base", str(BASE), "--peak", str(PEAK), "--seconds", "1.5"]
        command += ["--phases", "1000", "--timeout", "120"]  # until it is told to end
        self.rows: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env=engine_environment("patched", {"OMP_NUM_THREADS": "1"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.rows.append(json.loads(line))

    @property
    def peaks(self) -> int:
        return sum(row.get("phase") == "peak" for row in self.rows)

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"the loop ended: {self._process.stderr.read()}")

    def end(self) -> dict[str, Any]:
        """Its result."""
        self._process.terminate()
        assert self._process.wait(timeout=120) == 0
        self._reader.join()
        return self.rows[-1]

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def test_a_training_loop_and_a_server_take_turns(trio: Cluster) -> None:
    assert BASE + PEAK + SERVER_PEAK > CAPACITY
    for name in trio.servers:
        trio.set_policy(name, guarantee=0)
    with LedgerWatch(trio.path) as watch, Training(trio) as training:
        # 20 requests of 9 blocks: 45 MiB, all that the loop leaves between its peaks.
        with SteadyLoad(trio.servers["large"], 20, 1050, 64, 800) as load:

            def both_peaked() -> bool:
                training.check_alive()
                return training.peaks >= PEAKS and watch.peak_committed("large") >= SERVER_PEAK

            wait_until(both_peaked, 120, "both at their peaks")
            during = len(load.answers)
        result = training.end()
    check_account(watch)
    assert watch.peak_committed("trainer") == PEAK == result["peak_bytes"]
    assert result["peaks"] >= PEAKS and result["steps"] > 0
    assert during > 0
    waits = [round(wait, 2) for wait in result["waits_s"]]
    print(
        f"{during} requests beside {result['peaks']} peaks of {PEAK / MIB:.0f} MiB, which the loop "
        f"waited {waits} s for; the server's peak was {watch.peak_committed('large') / MIB:.1f} "
        f"MiB of {CAPACITY / MIB:.0f}; {result['steps_per_s']:.0f} steps/s; {os.cpu_count()} cores"
    )
    assert max(waits) > 0, "it never had to wait: this was no contention"
    # A request takes a second or two; then what it leaves is the loop's, not the next request's.
    assert max(waits) < MOST_WAIT_S, f"the server took freed memory again {waits} s long"
    assert "trainer" not in {info.name for info in trio.ledger.members()}
