# SPDX-License-Identifier: Apache-2.0
"""The router puts a vLLM engine to sleep by the engine's own means, and a request wakes it."""

from __future__ import annotations

import asyncio
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


def test_a_model_sleeps_and_wakes_in_its_process(models: Models, tmp_path: Path) -> None:
    ledger_dir = tmp_path / "ledger"
    env = engine_environment(
        "patched",
        elastic_env(
            ledger_dir,
            name="alpha",
            capacity=str(64 * MIB),
            page_size=str(SERVER_PAGE),
            weights_dir=str(tmp_path / "weights"),
        )
        | {"VLLM_HOST_IP": "127.0.0.1"},
    )
    launch = {"port": free_port(), "model": str(models.llama), "args": list(SERVER_ARGS),
              "env": env, "log": str(tmp_path / "alpha.log")}  # fmt: skip
    settings = {
        "models": [
            {"name": "alpha", "replicas": [{"launch": launch}], "queue": {"timeout": "4m"},
             "sleep": {"at_start": True, "after": "2s"}},
        ],
    }  # fmt: skip

    def alpha() -> Any:
        found = Ledger(ledger_path(ledger_dir)).members()
        return next(member for member in found if member.name == "alpha")

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
                await until(lambda: model.state == "asleep")
                assert alpha().static_bytes == 0
            assert len(said) == 1, "the same answers after each sleep"
            assert s.pid("alpha") == pid
            assert (s.supervisor("alpha").starts, s.supervisor("alpha").crashes) == (1, 0)

    asyncio.run(main())
