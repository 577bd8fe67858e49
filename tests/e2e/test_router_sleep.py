# SPDX-License-Identifier: Apache-2.0
"""The router puts a vLLM engine to sleep by the engine's own means, and a request wakes it."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import MIB, SERVER_ARGS, SERVER_PAGE, Models
from tests.support.elastic import elastic_env, ledger_path
from tests.support.engines import engine_environment
from tests.support.launched import site
from tests.support.server import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(300)


def _model(name: str, models: Models, folder: Path, capacity: int, **sleep: Any) -> dict[str, Any]:
    env = engine_environment(
        "patched",
        elastic_env(
            folder / "ledger",
            name=name,
            capacity=str(capacity),
            page_size=str(SERVER_PAGE),
            weights_dir=str(folder / "weights"),
        )
        | {"VLLM_HOST_IP": "127.0.0.1"},
    )
    launch = {"port": free_port(), "model": str(models.llama), "args": list(SERVER_ARGS),
              "env": env, "log": str(folder / f"{name}.log")}  # fmt: skip
    return {"name": name, "replicas": [{"launch": launch, "gpu": "0"}], "queue": {"timeout": "4m"},
            "sleep": {"at_start": True, **sleep}}  # fmt: skip


def test_a_model_wakes_in_its_process_and_if_it_cannot_in_a_new_one(
    models: Models, tmp_path: Path
) -> None:
    ledger_dir = tmp_path / "ledger"
    there, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(models.llama, there)
    mine = replace(models, llama=there)
    model_settings = _model("alpha", mine, tmp_path, 64 * MIB, after="2s", retry="10ms")
    settings = {"gpus": {"0": {}}, "models": [model_settings]}

    def alpha() -> Any:
        found = Ledger(ledger_path(ledger_dir)).members()
        return next(member for member in found if member.name == "alpha")

    def loads() -> int:
        return (tmp_path / "alpha.log").read_text().count("shards: 100% Completed")

    async def main() -> None:
        async with site(tmp_path, settings) as s:
            s.client.timeout = 240
            model = s.router.models["alpha"]
            while model.state != "asleep":
                await asyncio.sleep(0.1)
            pid = s.pid("alpha")
            assert alpha().static_bytes == 0, "the weights are gone"
            said: set[str] = set()
            for cycle in (1, 2):
                asked = [
                    s.complete("alpha", prompt=[7] * 40, max_tokens=24, temperature=0)
                    for _ in range(6)
                ]
                answers = await asyncio.gather(*asked)
                assert [answer.status_code for answer in answers] == [200] * 6
                said |= {answer.json()["choices"][0]["text"] for answer in answers}
                assert model.wakes == cycle
                assert alpha().static_bytes > 0
                # The first time its weights were kept, the second time they were dropped: it loads
                # them once, not for the router and again by itself.
                assert loads() == cycle
                model_settings["sleep"]["level"] = 2
                s.reconfigure(settings)
                await until(lambda: model.state == "asleep")
                assert alpha().static_bytes == 0
            assert len(said) == 1, "the same answers after each sleep"
            assert s.pid("alpha") == pid
            assert (s.supervisor("alpha").starts, s.supervisor("alpha").crashes) == (1, 0)

            # Its weights were dropped, and now there is nothing to load them from.
            there.rename(away)
            for attempt in (1, 2):
                answer = await s.complete("alpha", prompt=[7] * 40)
                assert answer.status_code == 503, attempt
                assert "collective_rpc" in answer.json()["error"]["message"]
                assert s.pid("alpha") == pid
                await asyncio.sleep(0.05)
            third = asyncio.create_task(
                s.complete("alpha", prompt=[7] * 40, max_tokens=24, temperature=0)
            )
            await until(lambda: s.supervisor("alpha").crashes == 1)
            away.rename(there)  # in time for the next start
            assert {(await third).json()["choices"][0]["text"]} == said
            assert s.supervisor("alpha").starts == 2 and s.pid("alpha") != pid
            assert [m.name for m in Ledger(ledger_path(ledger_dir)).members() if m.alive] == [
                "alpha"
            ]

    asyncio.run(main())


def test_the_idle_one_makes_room(models: Models, tmp_path: Path) -> None:
    # Weights of 16 MiB each, in memory for one and a half; by themselves they would never sleep.
    capacity = 26 * MIB
    names = ("alpha", "beta")
    settings = {
        "gpus": {"0": {}},
        "ledger_dir": str(tmp_path / "ledger"),
        "models": [
            _model(name, models, tmp_path, capacity, after="1h", yields_after="500ms")
            for name in names
        ],
    }

    async def main() -> None:
        async with site(tmp_path, settings) as s:
            s.client.timeout = 240
            for name in names:
                while s.router.models[name].state != "asleep":
                    await asyncio.sleep(0.1)
            ledger = Ledger(ledger_path(tmp_path / "ledger"))
            said: set[str] = set()
            for turn in range(6):
                name, other = names[turn % 2], names[1 - turn % 2]
                answer = await s.complete(name, prompt=[7] * 40, max_tokens=24, temperature=0)
                assert answer.status_code == 200, answer.text
                said.add(answer.json()["choices"][0]["text"])
                static = {m.name: m.static_bytes for m in ledger.members() if m.alive}
                assert static[name] > 0 and static[other] == 0, "there is no room for both"
                # Its bytes are free a moment before it has said so.
                asleep = s.router.models[other]
                await until(lambda model=asleep: model.state == "asleep")
            assert len(said) == 1
            for name in names:
                model = s.router.models[name]
                assert (model.wakes, model.failed_wakes) == (3, 0)

    asyncio.run(main())
