# SPDX-License-Identifier: Apache-2.0
"""Systems side by side: each has its own GPU and cores, and nobody's result is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.side_by_side import gpus_of, parts

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "side_by_side.py"

LANE = """
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("--systems", "--out", "--work", "--until"):
    parser.add_argument(name)
args = parser.parse_args()
cell = vars(args) | {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]}
cell["cores"] = sorted(os.sched_getaffinity(0))
out = pathlib.Path(args.out)
(out / "cells.jsonl").write_text(json.dumps(cell) + "\\n")
print("a word of", args.systems)
while len(list(out.parent.glob("*/cells.jsonl"))) < int(args.until):
    time.sleep(0.02)
sys.exit(args.systems == "static")
"""


def _command(tmp_path: Path, systems: list[str], until: int, *options: str) -> list[str]:
    """Of runs that end once so many of them are at work."""
    lane = tmp_path / "lane.py"
    lane.write_text(LANE)
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--work", str(work), *options]
    return [*command, "--systems", *systems, "--", str(lane), "--until", str(until)]


def _cells(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    ]


def test_cores_are_shared_out() -> None:
    assert parts(range(8), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert parts([3, 5, 9], 2) == [[3], [5]]
    assert parts([3, 5], 4) == [[3, 5]] * 4


def test_gpus_are_shared_out() -> None:
    assert [gpus_of(i, 2, "") for i in range(2)] == [["0", "1"], ["2", "3"]]
    assert [gpus_of(i, 1, "3,1") for i in range(2)] == [["3"], ["1"]]
    with pytest.raises(SystemExit, match="fewer than 3 GPUs"):
        gpus_of(2, 1, "3,1")


def test_each_has_its_own_and_they_run_at_once(tmp_path: Path) -> None:
    systems = ["elastic", "off:kv_cache=1GiB"]
    command = _command(tmp_path, systems, 2, "--gpus", "2")
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    cells = _cells(tmp_path)
    assert [cell["systems"] for cell in cells] == systems
    assert [cell["gpu"] for cell in cells] == ["0,1", "2,3"]
    assert [cell["cores"] for cell in cells] == parts(sorted(os.sched_getaffinity(0)), 2)
    assert cells[0]["work"] != cells[1]["work"]
    text = (tmp_path / "out" / "off_kv_cache_1GiB" / "output.log").read_text()
    assert text == "a word of off:kv_cache=1GiB\n"


def test_one_that_fails_loses_nothing_of_the_others(tmp_path: Path) -> None:
    command = _command(tmp_path, ["static", "elastic"], 1)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "static ended with 1" in done.stdout and "elastic ended with 0" in done.stdout
    assert [cell["systems"] for cell in _cells(tmp_path)] == ["elastic", "static"]
    # Another run into the same folder: what was there stays, and is there once.
    command = _command(tmp_path, ["off"], 1)
    subprocess.run(command, check=True, timeout=60)
    assert [cell["systems"] for cell in _cells(tmp_path)] == ["elastic", "off", "static"]


def test_ended_from_outside_nothing_is_left(tmp_path: Path) -> None:
    child = subprocess.Popen(_command(tmp_path, ["elastic", "off"], 99))
    ended = time.monotonic() + 30
    while len(list(tmp_path.glob("out/*/cells.jsonl"))) < 2:
        assert time.monotonic() < ended and child.poll() is None
        time.sleep(0.05)
    lanes = psutil.Process(child.pid).children()
    assert len(lanes) == 2
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 143
    assert not any(lane.is_running() for lane in lanes)
