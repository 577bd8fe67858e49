# SPDX-License-Identifier: Apache-2.0
"""How many engines of a GPU start at a time, and what becomes of one that does not get that far."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.router.engines import EngineError
from kvcached_core.router.launch.process import EngineProcess
from kvcached_core.router.launch.supervisor import Hooks, Phase, Place, Supervisor
from kvcached_core.router.launch.turns import Turns
from kvcached_core.router.settings import GpuSettings, LaunchSettings, RestartSettings
from tests.support.launched import Site, launch, site
from tests.support.server import free_port
from tests.support.waiting import LONG_S, run, until

NEVER_READY = ["sh", "-c", "exec sleep 99"]


def several(folder: Path, count: int, parallel: int, **settings: Any) -> dict[str, Any]:
    models = [
        {"name": f"m{i}", "replicas": [{**launch(folder, **settings), "gpu": 0}]}
        for i in range(count)
    ]
    return {"models": models, "gpus": {"0": {"mps": False, "parallel_starts": parallel}}}


def starting(s: Site) -> int:
    return sum(s.supervisor(name).phase is Phase.STARTING for name in s.router.models)


@pytest.mark.parametrize("parallel", [1, 2])
def test_engines_of_a_gpu_start_so_many_at_a_time(tmp_path: Path, parallel: int) -> None:
    async def main() -> None:
        async with site(tmp_path, several(tmp_path, 3, parallel)) as s:
            most = 0

            def all_ready() -> bool:
                nonlocal most
                most = max(most, starting(s))
                return all(s.supervisor(name).ready for name in s.router.models)

            await until(all_ready)
            assert most == parallel

    run(main)


def test_a_reload_lets_more_start(tmp_path: Path) -> None:
    async def main() -> None:
        found = several(tmp_path, 4, 1, command=NEVER_READY)
        async with site(tmp_path, found) as s:
            for parallel in (1, 3):
                s.reconfigure({**found, "gpus": {"0": {"mps": False, "parallel_starts": parallel}}})
                await until(lambda wanted=parallel: starting(s) == wanted)  # type: ignore[misc]
                await asyncio.sleep(0.3)
                assert starting(s) == parallel

    run(main)


def test_the_next_one_starts_when_one_that_failed_is_gone(tmp_path: Path) -> None:
    """Until then it has memory that the next one needs."""

    async def main() -> None:
        found = several(tmp_path, 2, 1, command=NEVER_READY, stop_time="800ms")
        launched = found["models"][0]["replicas"][0]["launch"]
        launched |= {"command": ["sh", "-c", "trap '' TERM; sleep 99"], "start_time": "300ms"}
        async with site(tmp_path, found) as s:
            await until(lambda: s.supervisor("m0").phase is Phase.STOPPING)
            first = s.supervisor("m0").process
            assert first is not None and first.runs
            await until(lambda: s.supervisor("m1").starts == 1)
            assert not first.runs

    run(main)


def supervisor_of(probe: Callable[[float], Awaitable[None]]) -> Supervisor:
    return Supervisor(
        "it",
        LaunchSettings(port=free_port(), model="m", restart=RestartSettings(delay=0.05)),
        Place(asyncio.Lock(), Turns().of(lambda: ("gpu", GpuSettings()))),
        Hooks(
            lambda: (NEVER_READY, dict(os.environ)),
            probe,
            look=probe,
            pause=asyncio.sleep,
            restart=lambda: True,
            changed=lambda: None,
        ),
    )


def test_who_waits_for_a_start_that_is_called_off_hears_of_it() -> None:
    async def main() -> None:
        async def never(_: float) -> None:
            raise EngineError("not yet")

        supervisor = supervisor_of(never)
        started = asyncio.create_task(supervisor.started())
        stopped = asyncio.create_task(supervisor.stop())  # before anything of it has run
        with pytest.raises(EngineError, match="did not start"):
            await asyncio.wait_for(started, LONG_S)
        await stopped
        assert supervisor.starts == 0

    run(main)


def test_what_nobody_foresaw_ends_the_engine_and_starts_another() -> None:
    async def main() -> None:
        runs = []

        async def probe(_: float) -> None:
            if not runs:
                assert supervisor.process is not None
                runs.append(supervisor.process)
                raise RuntimeError("nobody thought of this")

        supervisor = supervisor_of(probe)
        supervisor.start()
        await until(lambda: supervisor.ready)
        assert (supervisor.starts, supervisor.crashes) == (2, 1)
        assert not runs[0].runs
        await supervisor.stop()

    run(main)


def test_what_is_left_of_a_run_is_killed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later its number may be that of somebody else's processes."""

    async def main() -> None:
        killed: list[int] = []
        monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
        process = await EngineProcess.start(["true"], dict(os.environ))
        assert [await process.wait() for _ in range(3)] == [0, 0, 0]
        assert killed == [process.pid]

    run(main)
