# SPDX-License-Identifier: Apache-2.0
"""The router under unkind conditions: engines that crash again and again, reloads at bad times."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvcached_core.router.engines import EngineError, VllmEngine
from tests.support import launched
from tests.support.launched import launch
from tests.support.routed import STREAM, settings_for, site
from tests.support.upstream import Upstream, serving
from tests.support.waiting import LONG_S, run, until
from tests.unit.test_router_replicas import hang_up

NO_MPS = {"gpus": {"0": {"mps": False, "parallel_starts": 2}}}


# -- queues ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["moved", "removed"])
def test_a_queue_that_comes_back_knows_who_runs(
    tmp_path: Path, away: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        async with site(tmp_path, engine) as s:
            gpus = {"a": {"max_running": 1}, "b": {"max_running": 1}}

            def on(gpu: str, name: str = "m") -> dict[str, Any]:
                replicas = [{"url": s.urls[0], "gpu": gpu}]
                return {"gpus": gpus, "models": [{"name": name, "replicas": replicas}]}

            s.reconfigure(on("a"))
            s.router.reload()
            await until(lambda: s.router.models["m"].replicas[0].available)
            first = asyncio.create_task(s.complete())
            await until(lambda: engine.running == 1)
            s.reconfigure(on("b") if away == "moved" else on("b", "other"))
            s.router.reload()
            s.reconfigure(on("a"))
            s.router.reload()
            second = asyncio.create_task(s.complete())
            await until(lambda: sum(gate.waiting for gate in s.router.gates) == 1)
            assert engine.running == 1
            assert engine.gate is not None
            engine.gate.set()
            assert (await first).status_code == (await second).status_code == 200
            assert engine.most_running == 1
            await until(lambda: [gate.name for gate in s.router.gates] == ["gpu a"])
        assert "unforeseen" not in caplog.text, "what was asked as it was taken away"

    run(main)


def _waited(text: str) -> tuple[int, float]:
    """How many waits were counted, and their sum."""
    found = []
    for what in ("count", "sum"):
        match = re.search(rf'^kvcached_router_queue_seconds_{what}{{model="m"}} (\S+)$', text, re.M)
        found.append(0.0 if match is None else float(match[1]))
    return int(found[0]), found[1]


def test_the_time_at_an_engine_is_none_in_the_queue(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream()

        async def breaks_first(request: Request, data: dict[str, Any]) -> Response:
            if len(engine.seen) > 1:
                return JSONResponse({})
            await asyncio.sleep(0.5)
            return await hang_up(request, data)

        engine.handler = breaks_first
        async with site(tmp_path, engine) as s:
            assert (await s.complete()).status_code == 200
            count, total = _waited(s.router.metrics.text().decode())
            assert len(engine.seen) == count == 2, "one for each attempt"
            assert total < 0.4

    run(main)


def test_a_second_attempt_has_what_is_left_of_the_queues_time(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream()

        async def breaks_first(request: Request, data: dict[str, Any]) -> Response:
            first = len(engine.seen) == 1
            await asyncio.sleep(0.8 if first else 0.2)
            return await hang_up(request, data) if first else JSONResponse({})

        engine.handler = breaks_first
        top = {"gpus": {"0": {"max_running": 1}}, "health": {"interval": "1h", "failures": 9}}
        async with site(tmp_path, engine) as s:
            model = {"name": "m", "replicas": [{"url": s.urls[0], "gpu": "0"}]}
            s.reconfigure({**top, "models": [{**model, "queue": {"timeout": "700ms"}}]})
            s.router.reload()
            await until(lambda: s.router.models["m"].replicas[0].available)
            first = asyncio.create_task(s.complete())
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            await asyncio.sleep(0.5)
            # It has the place when the first one's engine broke down, so that one waits again.
            second = asyncio.create_task(s.complete())
            assert [(await each).status_code for each in (first, second)] == [200, 200]

    run(main)


# -- engines that crash again and again -----------------------------------------------------------


def _model(*replicas: dict[str, Any], **model: Any) -> dict[str, Any]:
    placed = [{**replica, "gpu": 0} for replica in replicas]
    return {"models": [{"name": "m", "replicas": placed, **model}], **NO_MPS}


def test_who_wakes_a_model_by_hand_hears_that_its_engine_crashes(tmp_path: Path) -> None:
    async def main() -> None:
        words = [sys.executable, "-c", "import sys; print('no such weights'); sys.exit(3)"]
        async with launched.site(tmp_path, _model(launch(tmp_path, command=words))) as s:
            answer = await s.client.post("/action/wakeup/m")
            assert answer.status_code == 503
            assert answer.json()["success"] is False
            assert "ended with status 3: no such weights" in answer.json()["message"]
            assert int(answer.headers["retry-after"]) >= 1
            assert s.supervisor().wanted, "it goes on trying"

    run(main)


def test_who_wakes_a_model_by_hand_waits_for_an_engine_that_starts(tmp_path: Path) -> None:
    async def main() -> None:
        flag = tmp_path / "again"
        again = " ".join(launched.UPSTREAM[:-1])
        script = f"[ -e {flag} ] || {{ sleep 0.5; exit 3; }}\nexec {again} $0 0"
        words = ["sh", "-c", script, "{port}"]
        replica = launch(tmp_path, command=words, restart={"delay": "300ms"})
        async with launched.site(tmp_path, _model(replica)) as s:
            await until(lambda: s.supervisor().crashes == 1)
            flag.touch()
            # What ended before it was asked is not held against it.
            answer = await s.client.post("/action/wakeup/m")
            assert (answer.status_code, answer.json()["success"]) == (200, True)

    run(main)


def test_a_wake_by_hand_is_bounded_as_every_request(tmp_path: Path) -> None:
    async def main() -> None:
        words = [sys.executable, "-c", "import time; time.sleep(99)"]
        found = _model(launch(tmp_path, command=words)) | {"limits": {"request_time": "500ms"}}
        async with launched.site(tmp_path, found) as s:
            answer = await s.client.post("/action/wakeup/m")
            assert (answer.status_code, answer.json()["success"]) == (504, False)
            assert "0.5 s" in answer.json()["message"]

    run(main)


def test_a_replica_that_wakes_is_used_while_another_one_starts(tmp_path: Path) -> None:
    async def main() -> None:
        words = [sys.executable, "-c", "import time; time.sleep(99)"]
        engine = Upstream(asleep=True, wake_gate=asyncio.Event())
        async with serving(engine.app()) as url:
            found = _model(launch(tmp_path, command=words), {"url": url})
            async with launched.site(tmp_path, found) as s:
                task = asyncio.create_task(s.complete())
                await until(lambda: engine.wakes == 1 and s.router.models["m"].waiting == 1)
                assert engine.wake_gate is not None
                engine.wake_gate.set()
                begin = time.monotonic()
                assert (await task).status_code == 200
                assert time.monotonic() - begin < 5, "nobody told those who waited"

    run(main)


def _probes(url: str) -> int:
    return int(httpx.get(f"{url}/probes", trust_env=False).json())


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_an_engine_is_probed_once_a_period(tmp_path: Path, kind: str) -> None:
    """SGLang generates a token for each probe."""

    async def main() -> None:
        replica = {**launch(tmp_path, hang_time="1h"), "engine": kind}
        top = {"health": {"interval": "1s"}}
        async with launched.site(tmp_path, _model(replica) | top) as s:
            await until(lambda: s.supervisor().ready)
            url = s.router.models["m"].replicas[0].name
            before = await asyncio.to_thread(_probes, url)
            await asyncio.sleep(4)
            probes = await asyncio.to_thread(_probes, url) - before
            assert 3 <= probes <= 5

    run(main)


def test_an_engine_that_pauses_is_left_out_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        top = {"health": {"interval": "50ms", "timeout": "200ms"}}
        async with launched.site(tmp_path, _model(launch(tmp_path)) | top) as s:
            await until(lambda: s.supervisor().ready)
            replica = s.router.models["m"].replicas[0]
            os.kill(s.pid(), signal.SIGSTOP)
            await until(lambda: not replica.healthy)
            os.kill(s.pid(), signal.SIGCONT)
            await until(lambda: replica.healthy)
            assert (await s.complete()).status_code == 200
            assert (s.supervisor().starts, s.supervisor().crashes) == (1, 0)

    run(main)


def test_a_probe_that_never_ends_is_a_failed_one(tmp_path: Path) -> None:
    async def main() -> None:
        async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, httpx.AsyncClient(base_url=url, trust_env=False) as client:
            engine = VllmEngine(client)
            with pytest.raises(EngineError, match="GET /health: TimeoutError"):
                await asyncio.wait_for(engine.check(0.3), 5)

    run(main)


# -- other settings meanwhile ---------------------------------------------------------------------


def test_a_replica_that_falls_asleep_is_not_closed_in_the_middle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engines = [Upstream("stays"), Upstream("goes", sleep_gate=asyncio.Event())]
        async with site(tmp_path, *engines) as s:
            model = s.router.models["m"]
            goes = model.replicas[1]
            sleeping = asyncio.create_task(s.client.post("/action/sleep/m"))
            await until(lambda: engines[1].sleeps == 1)
            s.reconfigure(settings_for(s.urls[:1]))
            s.router.reload()
            await asyncio.sleep(0.2)
            assert not goes.closed
            assert engines[1].sleep_gate is not None
            engines[1].sleep_gate.set()
            assert (await sleeping).status_code == 200
            assert (engines[1].asleep, model.state) == (True, "asleep")
            await until(lambda: goes.closed)
        assert "unforeseen" not in caplog.text

    run(main)


def test_what_fails_in_an_unforeseen_way_has_its_request_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream()) as s:
            monkeypatch.setattr(s.router, "model", lambda name: 1 / 0)
            answer = await s.client.post(
                "/v1/completions", content=STREAM, headers={"x-request-id": "abc"}
            )
            assert (answer.status_code, answer.headers["x-request-id"]) == (500, "abc")
            assert answer.json()["error"]["code"] == "internal_error"
            assert s.router.bodies.held == 0

    run(main)


def test_work_in_the_background_does_not_end_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream("old"), Upstream("new")) as s:
            s.reconfigure(settings_for(s.urls[:1]))
            s.router.reload()
            (old,) = s.router.models["m"].replicas

            async def fail() -> None:
                raise RuntimeError("nobody thought of this")

            monkeypatch.setattr(old, "close", fail)
            s.reconfigure(settings_for(s.urls[1:]))
            s.router.reload()
            await until(lambda: "nobody thought of this" in caplog.text)
            monkeypatch.undo()

    run(main)
