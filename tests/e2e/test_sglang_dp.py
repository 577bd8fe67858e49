# SPDX-License-Identifier: Apache-2.0
"""Plain data parallelism: every replica of SGLang is a member of its own, on one ledger."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import Models
from tests.support.elastic import check_account, elastic_env, ledger_path
from tests.support.server import burst
from tests.support.sglang_fixtures import References, check_unhurt
from tests.support.sglang_server import SglangHost, SglangServer
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
PAGE = 64 << 10
# Less than the prefix caches of both would take.
CAPACITY = 24 * MIB


def test_replicas_share_memory_like_any_two_engines(
    models: Models,
    sglang_references: Callable[[], References],
    sglang_patched: SglangHost,
    tmp_path: Path,
) -> None:
    path = ledger_path(tmp_path / "ledger")
    env = elastic_env(path.parent, capacity=str(CAPACITY), page_size=str(PAGE))
    del env["KVCACHED_NAME"]  # both would have it
    server = SglangServer("dp", models.llama, tmp_path, ("--dp-size=2",), env, host=sglang_patched)
    # Before it starts: idle replicas keep both cores busy.
    mixed = sglang_references().mixed
    try:
        server.start().wait_ready()
        ledger = Ledger(path)
        first, second = ledger.members()
        assert first.name != second.name
        with LedgerWatch(path) as watch:
            for _ in range(2):
                mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
        check_account(watch)
        # Requests go to both in turn; together they had what there is.
        for info in (first, second):
            assert watch.peak_committed(info.name) > CAPACITY // 4
        assert watch.peak_committed() > 0.9 * CAPACITY
        for info in (first, second):
            ledger.trim(info.slot, info.generation, -1, cached=True)
        wait_until(lambda: {m.leased for m in ledger.members()} == {PAGE}, 15, "idle and empty")
        check_unhurt(server)

        # Told to end, it leaves nothing behind.
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: server.code is not None, 60, "it ends")
        heir = ledger.join("heir")
        wait_until(lambda: heir.lease(CAPACITY), 15, "what ended holds nothing")
        heir.leave()
    finally:
        server.stop()
