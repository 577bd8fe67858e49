# SPDX-License-Identifier: Apache-2.0
"""Launched engines as clients of MPS: real processes and a stand-in daemon."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from kvcached_core.mps import DIRECTORY, Mps
from kvcached_core.router.launch import mps_guard
from kvcached_core.router.launch.mps_guard import MpsGuard
from tests.support import fake_mps
from tests.support.launched import Site, launch, site
from tests.support.waiting import run, until

SERVER = 4242


@pytest.fixture
def mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mps]:
    """The stand-in on PATH, a driver that shows a GPU, and a directory short enough for sockets."""
    program = fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    with tempfile.TemporaryDirectory(prefix="mps-") as name:
        monkeypatch.setenv(DIRECTORY, f"{name}/mps")
        daemon = Mps()
        yield daemon
        daemon.stop(force=True)


def settings(tmp_path: Path, *gpus: int, **gpu: Any) -> dict[str, Any]:
    models = [
        {"name": f"m{i}", "replicas": [{**launch(tmp_path), "gpu": where}]}
        for i, where in enumerate(gpus)
    ]
    return {"models": models, "gpus": {each: {"device": each, **gpu} for each in set(gpus)}}


def variables(pid: int) -> dict[str, str]:
    text = (Path("/proc") / str(pid) / "environ").read_bytes().decode()
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


async def all_ready(s: Site, count: int) -> list[int]:
    await until(lambda: all(s.supervisor(f"m{i}").ready for i in range(count)))
    return [s.pid(f"m{i}") for i in range(count)]


def serving(mps: Mps, pids: list[int], state: str) -> None:
    (mps.log / "servers.json").write_text(json.dumps({SERVER: pids}))
    (mps.log / "state").write_text(state)


def test_engines_are_clients_of_a_daemon_that_ends_with_them(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        found = settings(tmp_path, 0, mps=True)
        found["models"][0]["replicas"][0]["launch"]["env"] = {"KVCACHED_SM_SHARE": 40}
        async with site(tmp_path, found) as s:
            (pid,) = await all_ready(s, 1)
            env = variables(pid)
            assert env["CUDA_MPS_PIPE_DIRECTORY"] == str(mps.pipe)
            assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "40"
            assert env["CUDA_VISIBLE_DEVICES"] == "0"
            assert mps.pid() is not None
        assert mps.pid() is None, "the router started it"

    run(main)


def test_a_daemon_that_ran_before_goes_on(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        before = mps.start()
        async with site(tmp_path, settings(tmp_path, 0)) as s:
            (pid,) = await all_ready(s, 1)
            assert "CUDA_MPS_PIPE_DIRECTORY" in variables(pid), "auto: where it can run"
        assert mps.pid() == before

    run(main)


def test_a_fault_of_one_has_all_started_again_in_order(
    tmp_path: Path, mps: Mps, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        guard = MpsGuard(settle_s=0.3)
        async with site(tmp_path, settings(tmp_path, 0, 0, 0), guard) as s:
            before = await all_ready(s, 3)
            serving(mps, before, "FAULT\n")
            # m1's neighbours have lost their contexts too, and may not know it: they live on.
            os.kill(before[1], signal.SIGKILL)
            await until(lambda: not any(s.supervisor(f"m{i}").ready for i in range(3)))
            await asyncio.sleep(0.5)
            assert not any(s.supervisor(f"m{i}").ready for i in range(3)), "none before it is over"
            caplog.records[:], old = [], list(caplog.records)
            serving(mps, [], "ACTIVE\n")
            after = await all_ready(s, 3)
            assert not set(before) & set(after)
            assert guard.faults == 1
            fault = [r.getMessage() for r in old if "fatal fault of one MPS client" in r.message]
            assert len(fault) == 1
            assert "m1 on port" in fault[0].split("ended first")[0]
            assert fault[0].count("m0 on port") == fault[0].count("m2 on port") == 1
            assert "the server reports FAULT" in fault[0]
            starts = [r.getMessage() for r in caplog.records if ": process " in r.message]
            names = [text.split()[1] for text in starts if "ended" not in text]
            assert names == ["m0", "m1", "m2"]
            assert [(await s.complete(f"m{i}")).status_code for i in range(3)] == [200] * 3
            assert guard.faults == 1, "their ends were no further faults"

    run(main)


@pytest.mark.parametrize("asked", [["m1"], ["m0", "m1"], ["m0", "m1", "m2"]])
def test_a_fault_while_all_sleep_is_found_by_the_first_that_wakes(
    tmp_path: Path, mps: Mps, asked: list[str]
) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=0.3)
        async with site(tmp_path, settings(tmp_path, 0, 0, 0), guard) as s:
            before = await all_ready(s, 3)
            for name in ("m0", "m1", "m2"):
                assert (await s.client.post(f"/action/sleep/{name}")).status_code == 200
                # Nobody computes, so nobody ends; but none can have its weights back.
                await s.behave(name, wake_status=500)
            serving(mps, before, "FAULT\n")
            answers = [asyncio.create_task(s.complete(name)) for name in asked]
            await until(lambda: not any(s.supervisor(f"m{i}").ready for i in range(3)))
            serving(mps, [], "ACTIVE\n")
            assert [(await answer).status_code for answer in answers] == [200] * len(asked)
            assert guard.faults == 1
            for name in ("m0", "m1", "m2"):
                # The others had lost their contexts as well: they start when they are asked.
                expected = (2, True) if name in asked else (1, False)
                assert (s.supervisor(name).starts, s.supervisor(name).wanted) == expected
            assert [(await s.complete(f"m{i}")).status_code for i in range(3)] == [200] * 3
            assert [s.supervisor(f"m{i}").starts for i in range(3)] == [2, 2, 2]
            assert guard.faults == 1

    run(main)


def test_a_fault_found_by_one_that_falls_asleep(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=0.3)
        async with site(tmp_path, settings(tmp_path, 0, 0), guard) as s:
            before = await all_ready(s, 2)
            await s.behave("m0", sleep_status=500)
            assert (await s.client.post("/action/sleep/m0")).status_code == 409
            assert [s.pid(f"m{i}") for i in range(2)] == before, "its own affair"
            serving(mps, before, "FAULT\n")
            assert (await s.client.post("/action/sleep/m0")).status_code == 409
            await until(lambda: not any(s.supervisor(f"m{i}").ready for i in range(2)))
            serving(mps, [], "ACTIVE\n")
            after = await all_ready(s, 2)
            assert not set(before) & set(after) and guard.faults == 1

    run(main)


def test_several_that_end_at_once_share_a_fault(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=0.3)
        async with site(tmp_path, settings(tmp_path, 0, 0, 0), guard) as s:
            before = await all_ready(s, 3)
            serving(mps, before, "ACTIVE\n")
            for pid in before[:2]:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: s.supervisor("m2").crashes == 1)
            after = await all_ready(s, 3)
            assert not set(before) & set(after)
            assert guard.faults == 1

    run(main)


def test_the_end_of_one_without_a_fault_is_its_own_business(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=0.1)
        async with site(tmp_path, settings(tmp_path, 0, 0), guard) as s:
            before = await all_ready(s, 2)
            serving(mps, before, "ACTIVE\n")
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: s.supervisor("m0").starts == 2)
            after = await all_ready(s, 2)
            assert after[1] == before[1]
            assert (guard.faults, s.supervisor("m1").crashes) == (0, 0)

    run(main)


def test_a_fault_does_not_reach_other_gpus(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=0.1)
        async with site(tmp_path, settings(tmp_path, 0, 0, 1), guard) as s:
            before = await all_ready(s, 3)
            serving(mps, before, "FAULT\n")
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: s.supervisor("m1").crashes == 1)
            serving(mps, [], "ACTIVE\n")
            after = await all_ready(s, 3)
            assert after[1] != before[1]
            assert after[2] == before[2]

    run(main)


def test_an_end_on_another_gpu_during_a_fault_is_its_own_business(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=0.1)
        async with site(tmp_path, settings(tmp_path, 0, 0, 1, 1), guard) as s:
            before = await all_ready(s, 4)
            serving(mps, before, "FAULT\n")
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: s.supervisor("m1").crashes == 1)
            # The server still waits for somebody of GPU 0 when this one ends of something else.
            os.kill(before[2], signal.SIGKILL)
            await until(lambda: s.supervisor("m2").crashes == 1)
            await asyncio.sleep(0.3)
            serving(mps, before[3:], "ACTIVE\n")
            after = await all_ready(s, 4)
            assert after[3] == before[3]
            assert (guard.faults, s.supervisor("m3").crashes) == (1, 0)

    run(main)


async def both_end(s: Site, pids: list[int]) -> None:
    """First one of GPU 0, then one of GPU 1, before anybody asks the server."""
    for index in (0, 2):
        os.kill(pids[index], signal.SIGKILL)
        await until(lambda index=index: s.supervisor(f"m{index}").crashes == 1)  # type: ignore[misc]


def test_of_two_gpus_with_an_end_only_that_with_the_fault_is_cleared(
    tmp_path: Path, mps: Mps
) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=1)
        async with site(tmp_path, settings(tmp_path, 0, 0, 1, 1), guard) as s:
            before = await all_ready(s, 4)
            serving(mps, before, "FAULT\n")
            await both_end(s, before)
            await until(lambda: s.supervisor("m1").crashes == 1)
            serving(mps, before[3:], "ACTIVE\n")
            after = await all_ready(s, 4)
            assert after[3] == before[3]
            assert guard.faults == 1

    run(main)


def test_the_second_gpu_is_cleared_if_the_first_was_not_it(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        guard = MpsGuard(settle_s=1)
        async with site(tmp_path, settings(tmp_path, 0, 0, 1, 1), guard) as s:
            before = await all_ready(s, 4)
            serving(mps, before, "FAULT\n")
            await both_end(s, before)
            await until(lambda: s.supervisor("m3").crashes == 1)
            serving(mps, [], "ACTIVE\n")
            after = await all_ready(s, 4)
            assert not set(before) & set(after)
            assert guard.faults == 2

    run(main)


def test_a_fault_that_stays_is_not_held_against_other_gpus(
    tmp_path: Path, mps: Mps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps_guard, "_FREE_S", 0.2)

    async def main() -> None:
        guard = MpsGuard(settle_s=0.1)
        async with site(tmp_path, settings(tmp_path, 0, 0, 1, 1), guard) as s:
            before = await all_ready(s, 4)
            # A client that is not the router's holds it up.
            serving(mps, [*before, os.getpid()], "FAULT\n")
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: s.supervisor("m1").starts == 2)
            os.kill(before[2], signal.SIGKILL)
            await until(lambda: s.supervisor("m2").starts == 2)
            after = await all_ready(s, 4)
            assert after[3] == before[3]
            assert guard.faults == 1
            # One of the same GPU still is; and once it was over, so is any.
            os.kill(after[0], signal.SIGKILL)
            await until(lambda: guard.faults == 2)
            after = await all_ready(s, 4)
            assert after[3] == before[3]
            serving(mps, after, "ACTIVE\n")
            os.kill(after[0], signal.SIGKILL)
            await until(lambda: s.supervisor("m0").starts == 4)
            after = await all_ready(s, 4)
            serving(mps, after, "FAULT\n")
            os.kill(after[2], signal.SIGKILL)
            await until(lambda: s.supervisor("m3").crashes == 1)

    run(main)


def test_nobody_starts_into_a_fault_from_the_queue_for_a_turn(tmp_path: Path, mps: Mps) -> None:
    async def main() -> None:
        mps.start()
        serving(mps, [], "FAULT\n")
        found = settings(tmp_path, 0, 0)
        found["models"][0]["replicas"][0]["launch"]["command"] = ["sh", "-c", "sleep 0.3; exit 3"]
        async with site(tmp_path, found, MpsGuard(settle_s=0.1)) as s:
            # m1 waits for m0, which ends of a fault before it is ready.
            await until(lambda: s.supervisor("m0").crashes == 1)
            await asyncio.sleep(2)  # time to ask the daemon, and to start
            assert s.supervisor("m1").starts == 0
            serving(mps, [], "ACTIVE\n")
            await until(lambda: s.supervisor("m1").ready)
            assert (s.supervisor("m1").starts, s.supervisor("m1").crashes) == (1, 0)

    run(main)


def test_mps_that_is_wanted_and_cannot_be_had(
    tmp_path: Path, mps: Mps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)

    async def main() -> None:
        async with site(tmp_path, settings(tmp_path, 0, mps=True)) as s:
            await until(lambda: s.supervisor("m0").crashes > 0)
            assert "MPS is configured: the NVIDIA driver shows no GPU" in s.supervisor("m0").problem
        async with site(tmp_path, settings(tmp_path, 0)) as s:
            (pid,) = await all_ready(s, 1)
            assert "CUDA_MPS_PIPE_DIRECTORY" not in variables(pid)

    run(main)
