# SPDX-License-Identifier: Apache-2.0
"""Which engine a request goes to, and what it waits for, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.support.routed import STREAM, settings_for, site
from tests.support.server import free_port
from tests.support.upstream import Handler, Upstream
from tests.support.waiting import LONG_S, run, until

# -- replicas -------------------------------------------------------------------------------------


def test_requests_go_to_the_least_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        engines = [Upstream(f"e{i}", gate=gate) for i in range(3)]
        async with site(tmp_path, *engines) as s:
            tasks = [asyncio.create_task(s.complete()) for _ in range(9)]
            await until(lambda: sum(len(each.seen) for each in engines) == 9)
            assert [len(each.seen) for each in engines] == [3, 3, 3]
            gate.set()
            assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}

    run(main)


def test_prompts_that_begin_alike_go_to_one_engine(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream(f"e{i}") for i in range(3)]
        async with site(tmp_path, *engines, routing="prefix", prefix_bytes=32) as s:
            places = {}
            for system in range(8):
                begin = f"system {system} " + "x" * 32
                answers = [await s.complete(prompt=f"{begin} question {i}") for i in range(4)]
                served = {answer.json()["served_by"] for answer in answers}
                assert len(served) == 1
                places[system] = served.pop()
            assert len(set(places.values())) > 1

    run(main)


def test_a_dead_replica_is_left_out_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        top = {"health": {"interval": "20ms", "failures": 2}}
        async with contextlib.AsyncExitStack() as stack:
            s = await stack.enter_async_context(
                site(tmp_path, Upstream("a"), Upstream("b"), top=top)
            )
            b = s.upstreams[1]
            replica = s.router.models["m"].replicas[1]
            b.healthy = False
            await until(lambda: not replica.healthy)
            answers = [await s.complete() for _ in range(4)]
            assert {answer.json()["served_by"] for answer in answers} == {"a"}
            health = (await s.client.get("/health/m")).json()["health"]
            assert [each["healthy"] for each in health["replicas"]] == [True, False]
            b.healthy = True
            await until(lambda: replica.healthy)
            answers = [await s.complete() for _ in range(4)]
            assert {answer.json()["served_by"] for answer in answers} == {"a", "b"}

    run(main)


def test_one_failed_probe_is_not_enough(tmp_path: Path) -> None:
    async def main() -> None:
        top = {"health": {"interval": "1h", "failures": 2}}
        async with site(tmp_path, engine := Upstream(), top=top) as s:
            replica = s.router.models["m"].replicas[0]
            await until(lambda: engine.probes == 1)  # the one at the start
            engine.healthy = False
            await replica.look(s.router.settings.health)
            assert replica.healthy
            engine.healthy = True
            await replica.look(s.router.settings.health)
            engine.healthy = False
            await replica.look(s.router.settings.health)
            assert replica.healthy, "they must be in a row"
            await replica.look(s.router.settings.health)
            assert not replica.healthy
            answer = await s.complete()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "unhealthy"
            assert int(answer.headers["retry-after"]) >= 1
            assert (await s.client.get("/health/m")).status_code == 503
            assert (await s.client.get("/health")).status_code == 200

    run(main)


def test_a_look_that_fails_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        top = {"health": {"interval": "10ms", "failures": 1}}
        async with site(tmp_path, engine := Upstream(), top=top) as s:
            (replica,) = s.router.models["m"].replicas

            async def fail(_: float, asleep: bool = False) -> None:
                raise RuntimeError("nobody thought of this")

            monkeypatch.setattr(replica.engine, "check", fail)
            await until(lambda: "nobody thought of this" in caplog.text)
            monkeypatch.undo()
            engine.healthy = False
            await until(lambda: not replica.healthy)

    run(main)


def test_another_replica_answers_for_one_that_nobody_listens_on(tmp_path: Path) -> None:
    async def main() -> None:
        top = {"health": {"interval": "1h", "failures": 100}}
        async with site(tmp_path, Upstream("a"), top=top) as s:
            dead = f"http://127.0.0.1:{free_port()}"
            s.reconfigure({**settings_for([dead, s.urls[0]]), **top})
            s.router.reload()
            gone = s.router.models["m"].replicas[0]
            gone.asleep = False  # as if it had been asked, and had died after that
            answers = [await s.complete() for _ in range(2)]
            assert [answer.json()["served_by"] for answer in answers] == ["a", "a"]
            assert not gone.healthy, "a refused connection is enough"
            assert 'retries_total{model="m"} 1.0' in s.router.metrics.text().decode()

    run(main)


async def hang_up(request: Request, _: dict[str, Any]) -> Response:
    """Headers and then the end of the connection, before any byte of the body."""

    async def stream() -> AsyncIterator[bytes]:
        raise ConnectionResetError
        yield b""

    return StreamingResponse(stream(), media_type="text/event-stream")


def test_nothing_was_sent_so_another_is_tried(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("bad", handler=hang_up), Upstream("good")]
        top = {"health": {"interval": "1h", "failures": 100}}
        async with site(tmp_path, *engines, top=top) as s:
            for _ in range(4):
                answer = await s.client.post("/v1/completions", content=STREAM)
                assert answer.status_code == 200
                assert answer.text.count("good") == 3
            assert engines[0].seen, "it was tried"

    run(main)


async def cannot(_: Request, __: dict[str, Any]) -> Response:
    return Response("busy", 503)


@pytest.mark.parametrize(
    ("handler", "status", "asked"), [(cannot, 503, [0, 1, 1, 1]), (hang_up, 502, [0, 0, 1, 1])]
)
def test_retries_are_bounded(
    tmp_path: Path, handler: Handler, status: int, asked: list[int]
) -> None:
    """One that engines break down over, which may be its fault, gets one more attempt only."""

    async def main() -> None:
        engines = [Upstream(f"bad{i}", handler=handler) for i in range(4)]
        top = {"health": {"interval": "1h", "failures": 100}}
        async with site(tmp_path, *engines, top=top, retries=2) as s:
            answer = await s.complete()
            assert answer.status_code == status
            if status == 502:
                assert answer.json()["error"]["code"] == "engine_failed"
            assert sorted(len(each.seen) for each in engines) == asked

    run(main)


def test_a_replica_that_cannot_now_is_not_the_last_word(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("busy", handler=cannot), Upstream("good")]
        async with site(tmp_path, *engines) as s:
            for _ in range(4):
                assert (await s.complete()).json()["served_by"] == "good"
            assert engines[0].seen

    run(main)


# -- the queue ------------------------------------------------------------------------------------


def test_the_queue_has_a_bound(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        top = {"gpus": {"0": {"max_running": 2}}}
        async with site(tmp_path, engine, top=top) as s:
            queue = {"max_waiting": 3, "timeout": "20s"}
            replicas = [{"url": s.urls[0], "gpu": 0}]
            s.reconfigure({**top, "models": [{"name": "m", "replicas": replicas, "queue": queue}]})
            s.router.reload()
            tasks = [asyncio.create_task(s.complete()) for _ in range(10)]
            refused = []
            for task in asyncio.as_completed(tasks):
                answer = await task
                if answer.status_code != 503:
                    break
                refused.append(answer)
                if len(refused) == 5:
                    assert (engine.running, s.router.models["m"].waiting) == (2, 3)
                    assert engine.gate is not None
                    engine.gate.set()
            assert len(refused) == 5
            for answer in refused:
                assert answer.json()["error"]["code"] == "queue_full"
                assert answer.headers["retry-after"] == "5"
            answers = await asyncio.gather(*tasks)
            assert [a.status_code for a in answers].count(200) == 5
            assert engine.most_running == 2

    run(main)


def test_the_queue_has_a_timeout(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        top = {"gpus": {"0": {"max_running": 1}}}
        async with site(tmp_path, engine, top=top) as s:
            queue = {"timeout": "100ms"}
            replicas = [{"url": s.urls[0], "gpu": 0}]
            s.reconfigure({**top, "models": [{"name": "m", "replicas": replicas, "queue": queue}]})
            s.router.reload()
            first = asyncio.create_task(s.complete())
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            answer = await s.complete()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "queue_timeout"
            assert engine.gate is not None
            engine.gate.set()
            assert (await first).status_code == 200, "the timeout is for waiting only"
            assert len(engine.seen) == 1

    run(main)


def test_models_of_a_gpu_share_its_queue_by_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        async with site(tmp_path, engine) as s:
            models = [
                {"name": name, "replicas": [{"url": s.urls[0], "gpu": "a"}], "ttft": ttft}
                for name, ttft in (("slow", "30s"), ("fast", "15s"), ("m", "1s"))
            ]
            s.reconfigure({"gpus": {"a": {"max_running": 1}}, "models": models})
            s.router.reload()
            tasks = [asyncio.create_task(s.complete("m"))]
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            for name in ("slow", "fast"):
                tasks.append(asyncio.create_task(s.complete(name)))
                await until(lambda name=name: s.router.models[name].waiting == 1)  # type: ignore[misc]
            assert engine.gate is not None
            engine.gate.set()
            await asyncio.gather(*tasks)
            order = [json.loads(body)["model"] for _, _, body in engine.seen]
            assert order == ["m", "fast", "slow"]

    run(main)
