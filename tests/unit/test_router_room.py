# SPDX-License-Identifier: Apache-2.0
"""Idle models that make room for one that wakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kvcached_core._core import Ledger, Member
from tests.support.routed import Site, site
from tests.support.upstream import Upstream, serving
from tests.support.waiting import run, until

MIB = 1 << 20
IDLE = {"after": "1h", "yields_after": "200ms"}


@asynccontextmanager
async def two(
    tmp_path: Path, idle: dict[str, Any], gpu: str = "0"
) -> AsyncIterator[tuple[Site, Upstream, Upstream, Ledger]]:
    """A router with `m`, awake, and `n`, which sleeps and wakes when its gate opens."""
    awake, sleeper = Upstream("m"), Upstream("n", asleep=True, wake_gate=asyncio.Event())
    directory = tmp_path / "ledgers"
    directory.mkdir(mode=0o700)
    ledger = Ledger(directory / "gpu-0.ledger", 100 * MIB, 0)
    top: dict[str, Any] = {"ledger_dir": str(directory), "gpus": {"0": {}, "1": {}}}
    async with serving(sleeper.app()) as url, site(tmp_path, awake, top=top) as s:
        models = [
            {"name": "m", "replicas": [{"url": s.urls[0], "gpu": gpu}], "sleep": idle},
            {"name": "n", "replicas": [{"url": url, "gpu": "0"}]},
        ]
        s.reconfigure({**top, "models": models})
        s.router.reload()
        await until(lambda: s.router.models["n"].state == "asleep")
        yield s, awake, sleeper, ledger


def waits(ledger: Ledger, name: str = "n waking") -> Member:
    member = ledger.join(name)
    member.set_demand(50 * MIB, 1)
    return member


def test_the_idle_one_sleeps_sooner_if_a_wake_waits_for_room(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path, IDLE) as (s, awake, sleeper, ledger):
            assert (await s.complete("m")).status_code == 200
            task = asyncio.create_task(s.complete("n"))
            await until(lambda: s.router.models["n"].state == "waking")
            await asyncio.sleep(0.6)
            assert awake.sleeps == 0, "there was room, as far as the ledger says"
            member = waits(ledger, "some engine")
            await asyncio.sleep(0.4)
            assert awake.sleeps == 0, "who waits for pages is given pages"
            member.leave()
            member = waits(ledger)
            await until(lambda: s.router.models["m"].state == "asleep")
            member.leave()
            assert sleeper.wake_gate is not None
            sleeper.wake_gate.set()
            assert (await task).status_code == 200
            assert not s.router.models["m"].slept_by_hand
            assert (awake.sleeps, awake.slept_while_running) == (1, False)
            assert (await s.complete("m")).status_code == 200

    run(main)


def test_it_has_to_be_idle(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path, IDLE) as (s, awake, sleeper, ledger):
            awake.gate = asyncio.Event()
            busy = asyncio.create_task(s.complete("m"))
            task = asyncio.create_task(s.complete("n"))
            await until(lambda: s.router.models["n"].state == "waking")
            member = waits(ledger)
            await asyncio.sleep(0.6)
            assert awake.sleeps == 0
            awake.gate.set()
            assert (await busy).status_code == 200
            await until(lambda: s.router.models["m"].state == "asleep")
            member.leave()
            assert sleeper.wake_gate is not None
            sleeper.wake_gate.set()
            assert (await task).status_code == 200

    run(main)


def test_neither_one_that_never_sleeps_nor_one_elsewhere(tmp_path: Path) -> None:
    async def main(case: int) -> None:
        folder = tmp_path / str(case)
        folder.mkdir()
        idle = {"yields_after": "0s"} if case == 0 else IDLE
        gpu = "1" if case == 1 else "0"
        async with two(folder, idle, gpu) as (s, awake, sleeper, ledger):
            task = asyncio.create_task(s.complete("n"))
            await until(lambda: s.router.models["n"].state == "waking")
            member = waits(ledger)
            await asyncio.sleep(0.7)
            assert awake.sleeps == 0
            member.leave()
            assert sleeper.wake_gate is not None
            sleeper.wake_gate.set()
            assert (await task).status_code == 200

    for case in range(2):
        run(lambda case=case: main(case))


def test_a_ledger_that_cannot_be_read_hinders_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path, IDLE) as (s, awake, sleeper, ledger):
            broken = Path(ledger.path).with_name("gpu-1.ledger")
            broken.write_bytes(b"no ledger")
            broken.chmod(0o600)
            task = asyncio.create_task(s.complete("n"))
            await until(lambda: s.router.models["n"].state == "waking")
            member = waits(ledger)
            await until(lambda: awake.sleeps == 1)
            member.leave()
            assert sleeper.wake_gate is not None
            sleeper.wake_gate.set()
            assert (await task).status_code == 200

    run(main)
