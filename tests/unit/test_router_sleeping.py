# SPDX-License-Identifier: Apache-2.0
"""Models that sleep, and are woken by requests or by hand."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.routed import settings_for, site
from tests.support.upstream import Upstream
from tests.support.waiting import LONG_S, run, until


def test_it_wakes_once_for_all(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(asleep=True, wake_gate=asyncio.Event())
        async with site(tmp_path, engine) as s:
            model = s.router.models["m"]
            assert model.state == "asleep", "the engine was asked when the router started"
            tasks = [asyncio.create_task(s.complete()) for _ in range(50)]
            await until(lambda: model.waiting == 50)
            assert model.state == "waking"
            assert not any(path == "/v1/completions" for path, _, _ in engine.seen)
            # The one that began it may leave; the others are served all the same.
            tasks[0].cancel()
            await until(lambda: model.waiting == 49)
            assert engine.wake_gate is not None
            engine.wake_gate.set()
            answers = await asyncio.gather(*tasks[1:])
            assert {answer.status_code for answer in answers} == {200}
            assert (engine.wakes, model.wakes, model.state) == (1, 1, "active")

    run(main)


def test_a_wake_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(asleep=True, wake_status=500)
        async with site(tmp_path, engine, sleep={"retry": "2s"}) as s:
            model = s.router.models["m"]
            answers = await asyncio.gather(*(s.complete() for _ in range(5)))
            for answer in answers:
                assert answer.status_code == 503
                error = answer.json()["error"]
                assert error["code"] == "wake_failed"
                assert "out of memory" in error["message"]
                assert answer.headers["retry-after"] in ("1", "2")
            assert (engine.wakes, model.state) == (1, "failed")
            engine.wake_status = 200
            assert (await s.complete()).status_code == 503, "not yet"
            assert engine.wakes == 1
            await asyncio.sleep(2.05)
            assert (await s.complete()).status_code == 200
            assert (engine.wakes, model.state) == (2, "active")

    run(main)


def test_an_awake_replica_that_is_ill_does_not_make_wakes_endless(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("ill"), Upstream("asleep", wake_status=500)]
        top = {"health": {"interval": "1h", "failures": 1}}
        async with site(tmp_path, *engines, top=top, sleep={"retry": "200ms"}) as s:
            model = s.router.models["m"]
            ill, asleep = model.replicas
            await until(lambda: all(engine.probes == 1 for engine in engines))
            engines[0].healthy = False
            await ill.look(s.router.settings.health)
            asleep.asleep = True
            answer = await s.complete()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "wake_failed")
            assert engines[1].wakes == 1
            engines[0].healthy = True
            await ill.look(s.router.settings.health)
            await asyncio.sleep(0.25)
            assert (await s.complete()).json()["served_by"] == "ill"

    run(main)


def test_idle_models_fall_asleep_and_busy_ones_never(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        async with site(tmp_path, engine, sleep={"after": "100ms", "level": 2}) as s:
            model = s.router.models["m"]
            begin = time.monotonic()
            task = asyncio.create_task(s.complete())
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            # It may have slept before the request came, on a slow machine.
            before = (engine.sleeps, engine.wakes)
            await asyncio.sleep(0.4)
            assert engine.sleeps == before[0], "a request is in flight"
            answer = await s.client.post("/action/sleep/m")
            assert (answer.status_code, answer.json()["success"]) == (409, False)
            assert engine.gate is not None
            engine.gate.set()
            assert (await task).status_code == 200
            ended = time.monotonic()
            await until(lambda: model.state == "asleep")
            assert time.monotonic() - ended >= 0.1
            assert time.monotonic() - begin < LONG_S
            assert ("/sleep?level=2&mode=wait", {}, b"") in engine.seen
            assert not engine.slept_while_running
            status = (await s.client.get("/sleep/status")).json()
            assert status["sleeping_models"]["m"]["manual_sleep"] is False
            assert (await s.complete()).status_code == 200
            assert (engine.sleeps, engine.wakes) == (before[0] + 1, before[1] + 1)
            assert engine.reloads == engine.wakes, "level 2 drops the weights"

    run(main)


def test_a_request_that_comes_while_it_falls_asleep(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(sleep_gate=asyncio.Event())
        async with site(tmp_path, engine) as s:
            model = s.router.models["m"]
            sleeping = asyncio.create_task(s.client.post("/action/sleep/m"))
            await until(lambda: engine.sleeps == 1)
            assert model.state == "sleeping"
            request = asyncio.create_task(s.complete())
            await until(lambda: model.waiting == 1)
            assert engine.wakes == 0, "one thing after the other"
            assert engine.sleep_gate is not None
            engine.sleep_gate.set()
            assert (await request).status_code == 200
            await sleeping
            assert (engine.sleeps, engine.wakes, engine.asleep) == (1, 1, False)

    run(main)


def test_minimum_sleep_holds_requests_but_not_operators(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, engine := Upstream(), sleep={"minimum": "300ms"}) as s:
            begin = time.monotonic()
            assert (await s.client.post("/action/sleep/m")).json()["success"]
            assert (await s.complete()).status_code == 200
            assert time.monotonic() - begin >= 0.3
            s.reconfigure(settings_for(s.urls, sleep={"minimum": "1h"}))
            s.router.reload()
            assert (await s.client.post("/action/sleep/m")).json()["success"]
            waiting = asyncio.create_task(s.complete())
            await until(lambda: s.router.models["m"].state == "waking")
            assert (await s.client.post("/action/wakeup/m")).json()["success"]
            assert (await waiting).status_code == 200
            assert (engine.sleeps, engine.wakes) == (2, 2)

    run(main)


def test_an_engine_without_sleep_mode_stays_awake(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("a"), Upstream("b", dev_mode=False)]
        async with site(tmp_path, *engines) as s:
            answer = await s.client.post("/action/sleep/m")
            assert answer.status_code == 409
            assert "VLLM_SERVER_DEV_MODE=1" in answer.json()["message"]
            assert engines[0].asleep is False, "what slept already was woken again"
            assert s.router.models["m"].state == "active"
            assert (await s.complete()).status_code == 200

    run(main)


def test_sglang_is_asked_by_its_own_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, engine := Upstream()) as s:
            replicas = [{"url": s.urls[0], "engine": "sglang"}]
            s.reconfigure({"models": [{"name": "m", "replicas": replicas}]})
            s.router.reload()
            assert (await s.client.post("/action/sleep/m")).json()["success"]
            assert engine.seen[-1] == ("/release_memory_occupation?", {}, b"{}")
            assert (await s.complete()).status_code == 200
            assert (engine.sleeps, engine.wakes) == (1, 1)

    run(main)


@pytest.mark.parametrize(
    ("level", "started", "said"),
    [
        (1, {"kvcached_sleep": True}, ""),
        (2, {"kvcached_sleep": True}, ""),
        (1, {"enable_memory_saver": True, "enable_weights_cpu_backup": True}, ""),
        (1, {"enable_memory_saver": True}, "--enable-weights-cpu-backup"),
        (2, {"enable_memory_saver": True, "enable_weights_cpu_backup": True}, "--enable-kvcached"),
        (1, {"kvcached_sleep": False}, "--enable-memory-saver"),
        (1, [], "/server_info"),
    ],
)
def test_sglang_sleeps_if_it_would_wake_with_its_weights(
    tmp_path: Path, level: int, started: Any, said: str
) -> None:
    async def main() -> None:
        async with site(tmp_path, engine := Upstream(server_info=started)) as s:
            replicas = [{"url": s.urls[0], "engine": "sglang"}]
            model = {"name": "m", "replicas": replicas, "sleep": {"level": level}}
            s.reconfigure({"models": [model]})
            s.router.reload()
            answer = (await s.client.post("/action/sleep/m")).json()
            assert answer["success"] is not bool(said)
            assert said in answer["message"]
            assert engine.sleeps == (not said)
            if not said:
                body = b"{}" if level == 1 else b'{"level":2}'
                assert engine.seen[-1] == ("/release_memory_occupation?", {}, body)
            assert (await s.complete()).status_code == 200

    run(main)


def test_one_that_cannot_sleep_serves_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, engine := Upstream(dev_mode=False)) as s:
            answer = await s.client.post("/action/sleep/m")
            assert answer.status_code == 409
            assert "VLLM_SERVER_DEV_MODE=1" in answer.json()["message"]
            assert s.router.models["m"].state == "active"
            assert (await s.complete()).status_code == 200
            assert (engine.sleeps, engine.wakes) == (0, 0)

    run(main)


def test_sglang_does_not_sleep_under_a_probe(tmp_path: Path) -> None:
    """Its /health has it generate a token, for which it must be awake, and stay so."""

    async def main() -> None:
        engine = Upstream()
        top = {"health": {"interval": "10ms", "timeout": "20s"}}
        async with site(tmp_path, engine, top=top) as s:
            engine.probe_gate = asyncio.Event()
            replicas = [{"url": s.urls[0], "engine": "sglang"}]
            s.reconfigure({**top, "models": [{"name": "m", "replicas": replicas}]})
            s.router.reload()
            await until(lambda: engine.probing == 1)
            sleeping = asyncio.create_task(s.client.post("/action/sleep/m"))
            await until(lambda: s.router.models["m"].state == "sleeping")
            # Another probe comes while it waits, which must not be of that kind.
            replica = s.router.models["m"].replicas[0]
            look = asyncio.create_task(replica.look(s.router.settings.health))
            await asyncio.sleep(0.05)
            assert engine.sleeps == 0
            engine.probe_gate.set()
            assert (await sleeping).json()["success"]
            await look
            assert (engine.sleeps, engine.slept_while_probed, engine.probed_asleep) == (1, False, 0)
            assert (await s.complete()).status_code == 200
            probes = engine.probes
            await until(lambda: engine.probes > probes)

    run(main)


def test_an_answer_that_makes_no_sense_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream(nonsense=True)) as s:
            assert s.router.models["m"].state == "active"
            assert (await s.complete()).status_code == 200

    run(main)


def test_what_nobody_foresaw_is_a_wake_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream(), sleep={"retry": "100ms"}) as s:
            model = s.router.models["m"]
            assert (await s.client.post("/action/sleep/m")).json()["success"]

            async def fail() -> bool:
                raise RuntimeError("nobody thought of this")

            monkeypatch.setattr(model, "_wake_all", fail)
            answer = await s.complete()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "wake_failed")
            assert "nobody thought of this" in answer.json()["error"]["message"]
            monkeypatch.undo()
            await asyncio.sleep(0.15)
            assert (await s.complete()).status_code == 200

    run(main)
