# SPDX-License-Identifier: Apache-2.0
"""Asked for and impossible: the engine does not start, and says why and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import SERVER_ARGS, Models
from tests.support.elastic import elastic_env, ledger_path
from tests.support.engines import EngineHost, Job
from tests.support.server import Server

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Refusal:
    """An impossible wish, and what the message must hold: the cause and the way out."""

    name: str
    reason: str
    remedy: str
    settings: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    switch: str = "true"


REFUSALS = [
    Refusal("size-text", "'huge' is not a size", "KVCACHED_PAGE_SIZE", {"page_size": "huge"}),
    Refusal("page-size", "is not a multiple", "KVCACHED_PAGE_SIZE", {"page_size": "1000"}),
    Refusal("layout", "layout", "'block' or 'layer'", {"layout": "diagonal"}),
    Refusal(
        "unknown-setting",
        "no setting 'pagesize'",
        "page_size",
        engine={"kvcached_config": {"pagesize": "2MiB"}},
    ),
    Refusal(
        "switch", "ENABLE_KVCACHED='perhaps'", "set it to 'true' or unset it", switch="perhaps"
    ),
    # One request of 4096 tokens takes 8 MiB.
    Refusal("capacity", "4096", "max_model_len", {"capacity": "4MiB"}),
    Refusal(
        "connector",
        "NixlConnector",
        "drop --kv-transfer-config",
        engine={"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}},
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_refused_with_the_remedy(
    refusal: Refusal, models: Models, patched: EngineHost, tmp_path: Path
) -> None:
    env = elastic_env(tmp_path, **refusal.settings) | {"ENABLE_KVCACHED": refusal.switch}
    _check_refused(patched, Job(models.llama, [[[5]]], refusal.engine, env), refusal)


def _check_refused(host: EngineHost, job: Job, refusal: Refusal) -> None:
    result = host.run(job)
    assert result.code == 1, f"started, or was killed ({result.code}): {result.log[-3000:]}"
    # The last thing the engine says, not some line among its settings.
    message = result.log[result.log.rindex("Traceback") :]
    error = message[re.search(r"^[\w.]+(Error|Exception)\b", message, re.MULTILINE).start() :]  # type: ignore[union-attr]
    assert refusal.reason in error, error
    assert refusal.remedy in error, error


def test_a_ledger_directory_that_cannot_be_made(
    models: Models, patched: EngineHost, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    job = Job(models.llama, [[[5]]], env=elastic_env(tmp_path / "file" / "ledger"))
    refusal = Refusal("directory", str(tmp_path / "file" / "ledger"), "KVCACHED_LEDGER_DIR")
    _check_refused(patched, job, refusal)


def test_a_ledger_with_nothing_left(models: Models, patched: EngineHost, tmp_path: Path) -> None:
    ledger = Ledger(ledger_path(tmp_path), 512 << 20, 0)
    greedy = ledger.join("greedy")
    assert greedy.lease(ledger.available())
    job = Job(models.llama, [[[5]]], env=elastic_env(tmp_path, start_wait_ms="200"))
    _check_refused(patched, job, Refusal("full", "greedy", "Free memory"))


def test_living_members_with_another_capacity(
    models: Models, patched: EngineHost, tmp_path: Path
) -> None:
    ledger = Ledger(ledger_path(tmp_path), 256 << 20, 0)
    member = ledger.join("other")
    job = Job(models.llama, [[[5]]], env=elastic_env(tmp_path, capacity="512MiB"))
    _check_refused(patched, job, Refusal("capacity", str(256 << 20), "capacity"))
    member.leave()


def test_the_command_line_exits_with_the_message(models: Models, tmp_path: Path) -> None:
    env = elastic_env(tmp_path, page_size="huge")
    server = Server("refused", models.llama, tmp_path, SERVER_ARGS, env).start()
    try:
        with pytest.raises(RuntimeError, match="ended with"):
            server.wait_ready(timeout_s=120)
    finally:
        server.stop()
    assert server.code not in (0, None)
    assert "'huge' is not a size" in server.output()
    assert "KVCACHED_PAGE_SIZE" in server.output()
