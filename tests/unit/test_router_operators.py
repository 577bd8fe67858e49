# SPDX-License-Identifier: Apache-2.0
"""What operators see, and who may ask: keys, states, traffic, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.routed import site
from tests.support.upstream import Upstream
from tests.support.waiting import run

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
