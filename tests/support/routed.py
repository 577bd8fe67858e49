# SPDX-License-Identifier: Apache-2.0
"""A router in the test's own event loop, in front of engines that do as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvcached_core.router.app import make_app
from kvcached_core.router.loading import load
from kvcached_core.router.router import Router

from .upstream import Upstream, serving
from .waiting import LONG_S

STREAM = json.dumps({"model": "m", "prompt": "hi", "stream": True}).encode()


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


def post(body: bytes, more: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n{more}\r\n"
    return head.encode() + body
