# SPDX-License-Identifier: Apache-2.0
"""A router in the test's event loop that launches processes of `tests.support.upstream`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvcached_core.router.app import make_app
from kvcached_core.router.launch.mps_guard import MpsGuard
from kvcached_core.router.launch.supervisor import Supervisor
from kvcached_core.router.loading import load
from kvcached_core.router.router import Router

from .server import free_port
from .upstream import serving
from .waiting import LONG_S

REPO = Path(__file__).resolve().parents[2]
UPSTREAM = [sys.executable, "-m", "tests.support.upstream", "{port}"]
QUICK = {"delay": "50ms", "longest": "200ms"}


def launch(folder: Path, *args: object, **settings: Any) -> dict[str, Any]:
    """A replica that is launched: an engine with the arguments of `upstream.main`."""
    port = settings.pop("port", None) or free_port()
    command = settings.pop("command", [*UPSTREAM, *map(str, args or (0,))])
    log = str(folder / f"engine-{port}.log")
    values = {"folder": str(REPO), "log": log, "restart": QUICK, "stop_time": "2s"} | settings
    return {"launch": {"port": port, "command": command, **values}}


@dataclass
class Site:
    """A router and a client of it."""

    router: Router
    client: httpx.AsyncClient
    path: Path

    def reconfigure(self, settings: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(settings))
        self.router.reload()

    async def complete(self, model: str = "m", **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hi", **more}
        return await self.client.post("/v1/completions", json=body)

    async def behave(self, model: str = "m", **fields: Any) -> None:
        """Have the model's engine do so from now on: fields of `upstream.Upstream`."""
        url = self.router.models[model].replicas[0].name
        (await self.client.post(f"{url}/behave", json=fields)).raise_for_status()

    def supervisor(self, model: str = "m", index: int = 0) -> Supervisor:
        found = self.router.models[model].replicas[index].supervisor
        assert found is not None
        return found

    def pid(self, model: str = "m", index: int = 0) -> int:
        process = self.supervisor(model, index).process
        assert process is not None and process.runs
        return process.pid


@contextlib.asynccontextmanager
async def site(
    tmp_path: Path, settings: dict[str, Any], guard: MpsGuard | None = None
) -> AsyncIterator[Site]:
    path = tmp_path / "router.yaml"
    path.write_text(json.dumps(settings))
    router = Router(load(path), guard)
    async with serving(make_app(router)) as url:
        client = httpx.AsyncClient(base_url=url, timeout=LONG_S, trust_env=False)
        async with client:
            yield Site(router, client, path)
