# SPDX-License-Identifier: Apache-2.0
"""Other settings while the router serves: nothing is dropped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvcached_core.config import ConfigError
from tests.support.routed import STREAM, post, settings_for, site
from tests.support.upstream import DONE, Upstream
from tests.support.waiting import run, until


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


def test_what_leaves_is_closed_with_the_router_at_the_latest(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [Upstream("old", gate=asyncio.Event()), Upstream("new")]
        async with site(tmp_path, *engines) as s:
            s.reconfigure(settings_for(s.urls[:1]))
            s.router.reload()
            (old,) = s.router.models["m"].replicas
            _, writer = await s.raw(post(STREAM))
            await until(lambda: old.load == 1)
            s.reconfigure(settings_for(s.urls[1:]))
            s.router.reload()
            assert (await s.complete()).json()["served_by"] == "new"
            assert old.load == 1 and not old.closed
        assert old.closed
        writer.close()

    run(main)
