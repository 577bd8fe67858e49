# SPDX-License-Identifier: Apache-2.0
"""What a request meets on its way through the router, over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.support.routed import STREAM, post, settings_for, site
from tests.support.upstream import DONE, Upstream, event
from tests.support.waiting import LONG_S, run, until

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
            series = s.router.metrics.text().decode()
            assert 'broken_total{model="m"} 1.0' in series
            assert 'requests_total{model="m",status="200"} 1.0' in series
            assert "aborted_total{" not in series, "the client was there"

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
            aborted = b'aborted_total{model="m"} 1.0'
            await until(lambda: aborted in s.router.metrics.text())

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
