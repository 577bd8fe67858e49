# SPDX-License-Identifier: Apache-2.0
"""The router over real HTTP, in front of engines that do as the tests say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kvcached_core.config import ConfigError
from kvcached_core.router.app import make_app
from kvcached_core.router.loading import load
from kvcached_core.router.router import Router
from tests.support.server import free_port
from tests.support.upstream import DONE, Handler, Upstream, event, serving

LONG_S = 20.0
"""No test takes so long unless something hangs."""


@dataclass
class Site:
    """A router, its engines, and a client."""

    router: Router
    url: str
    client: httpx.AsyncClient
    upstreams: list[Upstream]
    urls: list[str]
    path: Path

    async def complete(self, model: str = "m", **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hi", **more}
        return await self.client.post("/v1/completions", json=body)

    def reconfigure(self, settings: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(settings))  # JSON is YAML

    async def raw(self, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of our own, to behave badly on."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.split(":")[-1]))
        writer.write(text)
        await writer.drain()
        return reader, writer


def settings_for(urls: list[str], **model: Any) -> dict[str, Any]:
    replicas = [{"url": url} for url in urls]
    return {"models": [{"name": "m", "replicas": replicas, **model}]}


@contextlib.asynccontextmanager
async def site(
    tmp_path: Path, *upstreams: Upstream, top: dict[str, Any] | None = None, **model: Any
) -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serving(each.app())) for each in upstreams]
        path = tmp_path / "router.yaml"
        path.write_text(json.dumps({**settings_for(urls, **model), **(top or {})}))
        router = Router(load(path))
        url = await stack.enter_async_context(serving(make_app(router)))
        client = httpx.AsyncClient(base_url=url, timeout=LONG_S, trust_env=False)
        await stack.enter_async_context(client)
        yield Site(router, url, client, list(upstreams), urls, path)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 3 * LONG_S)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(0.002)


def post(body: bytes, more: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n{more}\r\n"
    return head.encode() + body


STREAM = json.dumps({"model": "m", "prompt": "hi", "stream": True}).encode()


# -- passing on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_a_request_reaches_the_engine_unchanged(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with site(tmp_path, engine := Upstream()) as s:
            body = b'{ "model":"m",\n "prompt" : "\\u00e4 \xc3\xa4", "x": 1.0 }'
            headers = {"content-type": "application/json", "x-session": "7", "cookie": "c",
                       "authorization": "Bearer secret", "x-request-id": "abc-1"}  # fmt: skip
            answer = await s.client.post(path, content=body, headers=headers)
            assert answer.status_code == 200
            assert answer.json()["choices"][0]["text"] == "hello"
            assert answer.headers.get_list("x-request-id") == ["abc-1"]
            ((seen_path, seen, seen_body),) = engine.seen
            assert (seen_path, seen_body) == (path, body)
            assert (seen["x-session"], seen["x-request-id"]) == ("7", "abc-1")
            assert "authorization" not in seen, "the client's key is not the engine's business"
            assert "cookie" not in seen

    run(main)


def test_a_stream_is_the_same_bytes_as_they_come(tmp_path: Path) -> None:
    pieces = [event("a"), b'data: {"odd', b'": "\xff\xfe"}\r\n\r', b"\n: ping\n\n", DONE]

    async def main() -> None:
        steps = [asyncio.Event() for _ in pieces]

        async def handler(_: Request, __: dict[str, Any]) -> Response:
            async def stream() -> AsyncIterator[bytes]:
                for step, piece in zip(steps, pieces, strict=True):
                    await step.wait()
                    yield piece

            return StreamingResponse(stream(), 200, {"x-extra": "1"}, "text/event-stream")

        async with site(tmp_path, Upstream(handler=handler)) as s:
            steps[0].set()
            async with s.client.stream("POST", "/v1/completions", content=STREAM) as answer:
                assert answer.headers["x-extra"] == "1"
                assert answer.headers["content-type"].startswith("text/event-stream")
                got = []
                async for chunk in answer.aiter_raw():
                    got.append(chunk)
                    # The next is only sent once this has arrived: nothing is held back.
                    if len(got) < len(steps):
                        steps[len(got)].set()
            assert b"".join(got) == b"".join(pieces)

    run(main)


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
def test_an_engines_error_is_passed_on(tmp_path: Path, status: int) -> None:
    said = b'{"error": {"message": "no",   "code": 7}}'

    async def handler(_: Request, __: dict[str, Any]) -> Response:
        return Response(said, status, {"retry-after": "3"}, "application/json")

    async def main() -> None:
        async with site(tmp_path, engine := Upstream(handler=handler)) as s:
            answer = await s.complete()
            assert (answer.status_code, answer.content) == (status, said)
            assert answer.headers["retry-after"] == "3"
            assert len(engine.seen) == 1

    run(main)


def test_request_ids(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream()) as s:
            made = [(await s.complete()).headers["x-request-id"] for _ in range(2)]
            assert made[0] != made[1]
            assert all(len(each) == 32 for each in made)
            for bad in ("a b", "x" * 129, ""):
                headers = {"x-request-id": bad}
                answer = await s.client.get("/health", headers=headers)
                assert answer.headers["x-request-id"] != bad

    run(main)


def test_wrong_requests(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, engine := Upstream()) as s:
            answers = [
                (await s.complete("nobody"), 404, "model_not_found"),
                (await s.client.post("/v1/completions", content=b"{"), 400, None),
                (await s.client.get("/v1/completions"), 405, None),
                (await s.client.get("/v1/nothing"), 404, None),
                (await s.client.get("/v1/models/nobody"), 404, "model_not_found"),
                (await s.client.get("/traffic/stats?window=x"), 400, None),
                (await s.client.get("/traffic/stats?window=0"), 400, None),
                (await s.client.get("/models/idle?threshold=nan"), 400, None),
            ]
            for answer, status, code in answers:
                assert answer.status_code == status, answer.request.url
                error = answer.json()["error"]
                assert error["message"]
                assert error["code"] == code
            assert not engine.seen

    run(main)


# -- limits ---------------------------------------------------------------------------------------


def test_a_body_that_is_too_long(tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async def main() -> None:
        top = {"limits": {"body": 1000}}
        async with site(tmp_path, engine := Upstream(), top=top) as s:
            for content in (b"x" * 1001, chunks()):  # announced, and not
                answer = await s.client.post("/v1/completions", content=content)
                assert answer.status_code == 413
                assert answer.json()["error"]["code"] == "body_too_large"
            # Refused by its length alone, before it is sent.
            reader, writer = await s.raw(post(b"", length=10**9))
            assert b" 413 " in await asyncio.wait_for(reader.readline(), LONG_S)
            writer.close()
            assert not engine.seen
            exact = json.dumps({"model": "m", "prompt": ""}).encode()
            exact = exact[:-2] + b"x" * (1000 - len(exact)) + exact[-2:]
            answer = await s.client.post("/v1/completions", content=exact)
            assert answer.status_code == 200

    run(main)


def test_a_body_that_comes_too_slowly(tmp_path: Path) -> None:
    async def main() -> None:
        top = {"limits": {"body_time": "100ms"}}
        async with site(tmp_path, Upstream(), top=top) as s:
            reader, writer = await s.raw(post(b'{"model', length=100))
            said = await asyncio.wait_for(reader.read(), LONG_S)  # until the router hangs up
            assert b" 408 " in said.splitlines()[0]
            assert b"body_timeout" in said
            writer.close()

    run(main)


def test_an_answer_that_takes_too_long(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        top = {"limits": {"request_time": "100ms"}}
        async with site(tmp_path, engine, top=top) as s:
            answer = await s.complete()
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "request_timeout"
            await asyncio.wait_for(engine.cancelled.wait(), LONG_S)

    run(main)


def test_an_engine_that_falls_silent_mid_stream(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream()

        async def handler(_: Request, __: dict[str, Any]) -> Response:
            async def stream() -> AsyncIterator[bytes]:
                try:
                    yield event("a")
                    await asyncio.sleep(LONG_S)
                except asyncio.CancelledError:
                    engine.cancelled.set()
                    raise

            return StreamingResponse(stream(), media_type="text/event-stream")

        engine.handler = handler
        top = {"limits": {"stall_time": "100ms"}}
        async with site(tmp_path, engine, top=top) as s:
            with pytest.raises(httpx.RemoteProtocolError):
                await s.client.post("/v1/completions", content=STREAM)
            await asyncio.wait_for(engine.cancelled.wait(), LONG_S)

    run(main)


def test_a_client_that_does_not_read(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream()
        sent = 0

        async def handler(_: Request, __: dict[str, Any]) -> Response:
            async def stream() -> AsyncIterator[bytes]:
                nonlocal sent
                try:
                    while True:
                        yield b"x" * 65536
                        sent += 65536
                        await asyncio.sleep(0)  # sending to nobody does not
                finally:
                    engine.cancelled.set()

            return StreamingResponse(stream(), media_type="text/event-stream")

        engine.handler = handler
        top = {"limits": {"stall_time": "300ms"}}
        async with site(tmp_path, engine, top=top) as s:
            _, writer = await s.raw(post(STREAM))
            # The engine is held up rather than its answer kept in memory, and then let go.
            await asyncio.wait_for(engine.cancelled.wait(), LONG_S)
            assert sent < 64 << 20
            await until(lambda: s.router.models["m"].pending == 0)
            writer.transport.abort()

    run(main)


# -- disconnects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [STREAM, b'{"model": "m", "prompt": "hi"}'])
def test_a_client_that_leaves_stops_the_engine(tmp_path: Path, body: bytes) -> None:
    async def main() -> None:
        engine = Upstream(tokens=1_000_000, pause_s=0.005)
        if body is not STREAM:
            engine.gate = asyncio.Event()
        async with site(tmp_path, engine) as s:
            _, writer = await s.raw(post(body))
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            writer.close()
            await asyncio.wait_for(engine.cancelled.wait(), LONG_S)
            model = s.router.models["m"]
            await until(lambda: model.pending == 0 and model.replicas[0].load == 0)
            assert model.replicas[0].gate.running == 0
            assert 'aborted_total{model="m"} 1.0' in s.router.metrics.text().decode()

    run(main)


def test_a_client_that_leaves_the_queue(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        top = {"gpus": {"0": {"max_running": 1}}}
        async with site(tmp_path, engine, top=top) as s:
            s.reconfigure({**top, **settings_for([]), "models": [
                {"name": "m", "replicas": [{"url": s.urls[0], "gpu": 0}]}]})  # fmt: skip
            s.router.reload()
            first = asyncio.create_task(s.complete())
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            model = s.router.models["m"]
            _, writer = await s.raw(post(STREAM))
            await until(lambda: model.waiting == 1)
            writer.close()
            await until(lambda: model.waiting == 0)
            assert engine.gate is not None
            engine.gate.set()
            assert (await first).status_code == 200
            assert len(engine.seen) == 1

    run(main)


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


# -- sleep ----------------------------------------------------------------------------------------


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


# -- reload ---------------------------------------------------------------------------------------


def test_reload_under_load_drops_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream(f"e{i}", tokens=20, pause_s=0.002) for i in range(3)]
        async with site(tmp_path, *engines) as s:
            stop = False
            texts: list[str] = []

            async def load_it() -> None:
                while not stop:
                    answer = await s.client.post("/v1/completions", content=STREAM)
                    assert answer.status_code == 200
                    texts.append(answer.text)

            tasks = [asyncio.create_task(load_it()) for _ in range(8)]
            for turn in range(12):
                kept = [url for i, url in enumerate(s.urls) if i != turn % 3]
                s.reconfigure(settings_for(kept))
                assert (await s.client.post("/admin/reload")).json()["reloads"] == turn + 1
                await asyncio.sleep(0.03)
            stop = True
            await asyncio.gather(*tasks)
            assert len(texts) > 20
            assert all(text.endswith(DONE.decode()) and text.count("data:") == 21 for text in texts)
            # What was left out is closed when its last request has ended.
            await until(lambda: not any("drain" in task.get_name() for task in s.router._tasks))

    run(main)


def test_a_request_of_a_model_that_is_taken_away_is_still_served(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Upstream(asleep=True, wake_gate=asyncio.Event())
        async with site(tmp_path, engine, Upstream("other")) as s:
            s.reconfigure(settings_for(s.urls[:1]))
            s.router.reload()
            model = s.router.models["m"]
            assert (await s.client.post("/action/sleep/m")).json()["success"]
            task = asyncio.create_task(s.complete())
            await until(lambda: model.waiting == 1)
            s.reconfigure({"models": [{"name": "n", "replicas": [{"url": s.urls[1]}]}]})
            s.router.reload()
            assert (await s.complete()).status_code == 404
            assert (await s.complete("n")).status_code == 200
            assert engine.wake_gate is not None
            engine.wake_gate.set()
            assert (await task).json()["served_by"] == "engine"

    run(main)


def test_requests_wait_while_new_replicas_are_asked(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("old"), Upstream("new")]
        async with site(tmp_path, *engines) as s:
            s.reconfigure(settings_for(s.urls[:1]))
            s.router.reload()
            engines[1].ask_gate = asyncio.Event()
            s.reconfigure(settings_for(s.urls[1:]))
            s.router.reload()
            task = asyncio.create_task(s.complete())
            model = s.router.models["m"]
            await until(lambda: model.waiting == 1 or task.done())
            engines[1].ask_gate.set()
            assert (await task).json()["served_by"] == "new"
            assert engines[1].wakes == 0

    run(main)


def test_what_a_reload_adds_may_be_asleep(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("a"), Upstream("b", asleep=True), Upstream("c", asleep=True)]
        async with site(tmp_path, *engines) as s:
            s.reconfigure(settings_for(s.urls[:1]))
            s.router.reload()
            added = {"name": "n", "replicas": [{"url": s.urls[2]}]}
            both = settings_for(s.urls[:2])["models"]
            for engine in engines[1:]:
                engine.asleep = True
            wakes = [engine.wakes for engine in engines]
            s.reconfigure({"models": [*both, added]})
            s.router.reload()
            # A model is asked before its first request, and a replica of an active one is woken.
            assert (await s.complete("n")).json()["served_by"] == "c"
            assert engines[2].wakes == wakes[2] + 1
            await until(lambda: s.router.models["m"].replicas[1].available)
            served = [(await s.complete()).json()["served_by"] for _ in range(4)]
            assert set(served) == {"a", "b"}
            assert engines[1].wakes == wakes[1] + 1
            assert engines[0].wakes == wakes[0]

    run(main)


def test_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream()) as s:
            before = s.router.settings
            s.path.write_text("models:\n  - nam: m\n")
            answer = await s.client.post("/admin/reload")
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["code"] == "bad_config"
            assert f"{s.path}:2:5: there is no setting models[0].nam" in error["message"]
            s.reconfigure({**settings_for(s.urls), "listen": "127.0.0.1:1"})
            with pytest.raises(ConfigError, match="needs a restart"):
                s.router.reload()
            assert s.router.settings is before
            assert (await s.complete()).status_code == 200

    run(main)


# -- keys -----------------------------------------------------------------------------------------


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clients").write_text("one\ntwo\n")
    (tmp_path / "admins").write_text("root\n")
    (tmp_path / "engine").write_text("inner\n")

    async def main() -> None:
        top: dict[str, Any] = {"keys": [{"file": "clients"}]}
        async with site(tmp_path, engine := Upstream(), top=top) as s:

            async def status(key: str | None, path: str = "/v1/completions") -> int:
                headers = {"authorization": f"Bearer {key}"} if key is not None else {}
                if path == "/v1/completions":
                    body = {"model": "m", "prompt": "x"}
                    answer = await s.client.post(path, json=body, headers=headers)
                elif path.startswith(("/action", "/admin")):
                    answer = await s.client.post(path, headers=headers)
                else:
                    answer = await s.client.get(path, headers=headers)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                return answer.status_code

            assert [await status(key) for key in (None, "three", "on", "one", "two")] == [
                401, 401, 401, 200, 200]  # fmt: skip
            assert len(engine.seen) == 2
            for path in ("/v1/models", "/metrics", "/sleep/status", "/models", "/nothing"):
                assert await status(None, path) == 401, path
            assert await status(None, "/health") == 200
            assert await status("one", "/action/wakeup/m") == 200, "there are no others yet"
            given = await s.client.get("/v1/models", headers={"x-api-key": "two"})
            assert given.status_code == 200
            basic = await s.client.get("/v1/models", headers={"authorization": "Basic one"})
            assert basic.status_code == 401

            replicas = [{"url": s.urls[0], "key": {"file": "engine"}}]
            s.reconfigure({**top, "admin_keys": [{"file": "admins"}],
                           "models": [{"name": "m", "replicas": replicas}]})  # fmt: skip
            s.router.reload()
            assert await status("one", "/action/wakeup/m") == 403
            assert await status("one", "/admin/reload") == 403
            assert await status("bad", "/action/wakeup/m") == 401
            assert await status("root", "/action/wakeup/m") == 200
            assert await status("root") == 200, "an admin may do the rest, too"
            assert engine.seen[-1][1]["authorization"] == "Bearer inner"

    run(main)


# -- for operators --------------------------------------------------------------------------------


def test_models_and_traffic(tmp_path: Path) -> None:
    async def main() -> None:
        name = "org/model-1"
        async with site(tmp_path, Upstream(), name=name) as s:

            async def get(path: str) -> Any:
                answer = await s.client.get(path)
                assert answer.status_code == 200, path
                return answer.json()

            (card,) = (await get("/v1/models"))["data"]
            assert (card["id"], card["object"]) == (name, "model")
            assert (await get(f"/v1/models/{name}")) == card
            await s.complete(name)
            await s.complete(name)
            stats = (await get("/traffic/stats?window=120"))["traffic_stats"][name]
            assert (stats["total_requests"], stats["successful_requests"]) == (2, 2)
            assert stats["request_rate"] == pytest.approx(2 / 120)
            assert stats["avg_response_time"] > 0
            assert stats["is_idle"] is False
            one = (await get("/traffic/stats/org%2Fmodel-1"))["model_stats"]
            assert one["model_name"] == name
            assert (await get("/models/idle?threshold=300"))["idle_models"] == []
            assert (await get("/models/idle?threshold=0"))["idle_models"] == [name]
            assert (await get("/models/active"))["active_models"] == [name]
            assert (await get(f"/health/{name}"))["health"]["healthy"] is True
            assert (await get("/health/all"))["models"][name]["state"] == "active"
            port = int(s.urls[0].split(":")[-1])
            endpoint = (await get("/models"))["models"][name]["endpoint"]
            assert endpoint == {"host": "127.0.0.1", "port": port}
            assert (await get("/get_server_info"))["models"] == 1
            assert (await get("/sleep/candidates"))["sleep_candidates"] == []

    run(main)


def test_metrics(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, Upstream(), ttft="1ms") as s:
            await s.complete()
            await s.complete("unknown model")
            answer = await s.client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            for line in (
                'kvcached_router_requests_total{model="m",status="200"} 1.0',
                'kvcached_router_requests_total{model="-",status="404"} 1.0',
                'kvcached_router_first_byte_seconds_count{model="m"} 1.0',
                'kvcached_router_objective_missed_total{model="m"} 1.0',
                'kvcached_router_model_state{model="m",state="active"} 1.0',
                'kvcached_router_model_state{model="m",state="asleep"} 0.0',
                'kvcached_router_waiting_requests{model="m"} 0.0',
                'kvcached_router_wakes_total{model="m"} 0.0',
                f'kvcached_router_replica_healthy{{model="m",replica="{s.urls[0]}"}} 1.0',
            ):
                assert line in answer.text, line
            assert "unknown model" not in answer.text, "clients do not make series"

    run(main)
