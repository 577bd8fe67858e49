# SPDX-License-Identifier: Apache-2.0
"""What clients send: many large bodies, slow ones, and such as are made to be slow to read."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.router.prompt import Prompt, parse
from tests.support.routed import post, site
from tests.support.upstream import Upstream
from tests.support.waiting import LONG_S, run, until

KIB = 1 << 10


def _body(num_bytes: int) -> bytes:
    empty = json.dumps({"model": "m", "prompt": ""}).encode()
    return empty[:-2] + b"x" * (num_bytes - len(empty)) + empty[-2:]


def test_many_large_bodies_do_not_fill_the_memory(tmp_path: Path) -> None:
    top = {"limits": {"body": 100 * KIB, "bodies": 250 * KIB}}

    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        async with site(tmp_path, engine, top=top) as s:
            # One that never sends its end counts by what has come of it.
            half = _body(100 * KIB)[: 90 * KIB]
            _, slow = await s.raw(post(half, length=100 * KIB))
            body = _body(95 * KIB)
            task = asyncio.create_task(s.client.post("/v1/completions", content=body))
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            await until(lambda: s.router.bodies.held == (90 + 95) * KIB)
            refused = await s.client.post("/v1/completions", content=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "bodies_full"
            assert int(refused.headers["retry-after"]) >= 1
            # Small ones still pass, also those whose length is not told in advance.
            assert engine.gate is not None
            engine.gate.set()
            assert (await s.complete()).status_code == 200

            async def chunks() -> Any:
                for _ in range(4):
                    yield b" " * 20 * KIB
                yield body

            assert (await task).status_code == 200
            answer = await s.client.post("/v1/completions", content=chunks())
            assert answer.status_code == 413
            slow.close()
            await until(lambda: s.router.bodies.held == 0)
            assert (await s.client.post("/v1/completions", content=body)).status_code == 200

    run(main)


def test_what_comes_in_pieces_counts_as_it_comes(tmp_path: Path) -> None:
    top = {"limits": {"body": 100 * KIB, "bodies": 150 * KIB}}

    async def main() -> None:
        async with site(tmp_path, Upstream(), top=top) as s:
            _, slow = await s.raw(post(_body(100 * KIB)[: 90 * KIB], length=100 * KIB))
            await until(lambda: s.router.bodies.held == 90 * KIB)
            sent = 0

            async def chunks() -> Any:
                nonlocal sent
                for _ in range(9):
                    yield b" " * 10 * KIB
                    sent += 1

            answer = await s.client.post("/v1/completions", content=chunks())
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "bodies_full")
            assert s.router.bodies.held == 90 * KIB
            slow.close()

    run(main)


def test_a_prompt_is_not_kept_as_objects(tmp_path: Path) -> None:
    """Of a list of numbers they take many times the bytes that came."""

    async def main() -> None:
        engine = Upstream(gate=asyncio.Event())
        async with site(tmp_path, engine, routing="prefix", prefix_bytes=16) as s:
            task = asyncio.create_task(s.complete(prompt=list(range(1000, 51_000))))
            await asyncio.wait_for(engine.started.wait(), LONG_S)
            gc.collect()
            (prompt,) = (found for found in gc.get_objects() if isinstance(found, Prompt))
            assert prompt.content == b"1000\x001001\x001002\x00" + b"1"
            assert engine.gate is not None
            engine.gate.set()
            assert (await task).status_code == 200

    run(main)


@pytest.mark.parametrize("part", [b"[],", b"{},"])
def test_a_body_of_many_small_parts_is_read_in_time(part: bytes) -> None:
    """Nobody else is served meanwhile."""
    body = b'{"model":"m","prompt":[' + part * ((8 << 20) // len(part)) + b"1]}"
    begin = time.process_time()
    prompt = parse(body).reduced(1024)
    took = time.process_time() - begin
    print(f"{took:.2f} s")
    assert took < 1.2
    assert prompt.tokens == len(body) // 4
    assert gc.isenabled()


def test_an_order_that_never_ends_is_given_up(tmp_path: Path) -> None:
    top = {"limits": {"body_time": "200ms"}}

    async def main() -> None:
        async with site(tmp_path, Upstream(), top=top) as s:
            head = "POST /action/memory HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{"
            reader, writer = await s.raw(head.encode())
            assert b" 408 " in await asyncio.wait_for(reader.readline(), LONG_S)
            writer.close()
            big = await s.client.post("/action/memory", content=b" " * 5000)
            assert big.status_code == 413

    run(main)
