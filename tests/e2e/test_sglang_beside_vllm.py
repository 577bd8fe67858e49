# SPDX-License-Identifier: Apache-2.0
"""A vLLM and an SGLang server share memory that either needs more than half of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import SERVER_ARGS, Models
from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account
from tests.support.load import Burst, check_complete
from tests.support.prompts import equal_prompts
from tests.support.server import Answer, VllmHost, burst
from tests.support.sglang_fixtures import check_unhurt
from tests.support.sglang_server import SglangHost, SglangServer
from tests.support.watch import LedgerWatch

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

CAPACITY = 48 * MIB
# 16 requests of 1150 tokens at the end, 2 KiB a token: 36 MiB.
BURST, LENGTH, ANSWER = 16, 1050, 100
MOST = CAPACITY // 2


@pytest.fixture
def cluster(
    models: Models,
    vllm_patched: VllmHost,
    sglang_patched: SglangHost,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("beside")
    cluster = Cluster(models.llama, folder, CAPACITY, SERVER_ARGS, vllm_patched)
    cluster.server("vllm")
    cluster.servers["sglang"] = SglangServer(
        "sglang", models.llama, folder, (), cluster.env("sglang"), host=sglang_patched
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def _check_same(solo: list[Answer], answers: list[Answer]) -> None:
    # A tie may go either way in another batch.
    equal = sum(a.tokens == b.tokens for a, b in zip(solo, answers, strict=True))
    assert equal >= BURST - 1


def test_bursts_in_turn_and_at_once(cluster: Cluster) -> None:
    prompts = equal_prompts(BURST, LENGTH, 77)
    sglang = cluster.servers["sglang"]
    assert isinstance(sglang, SglangServer)
    solo: dict[str, list[Answer]] = {}
    with LedgerWatch(cluster.path) as watch:
        for name in ("vllm", "sglang", "vllm", "sglang"):
            found = burst(cluster.servers[name], prompts, ANSWER)
            check_complete(found, ANSWER)
            # What was evicted for the other is computed anew, to the same end.
            _check_same(solo.setdefault(name, found), found)
    check_account(watch)
    # Either keeps its prefix cache until the other asks, so each took more than half back.
    for name in cluster.servers:
        assert watch.peak_committed(name) > MOST
        assert cluster.member(name).counters["reclaimed_bytes"] > 0

    for name in cluster.servers:
        cluster.empty(name)
    with LedgerWatch(cluster.path) as watch:
        bursts = {name: Burst(server, prompts, ANSWER) for name, server in cluster.servers.items()}
        for name, running in bursts.items():
            _check_same(solo[name], running.wait())
    check_account(watch)
    # They met: together they want half as much again as there is.
    assert watch.peak_leased() > 0.9 * CAPACITY
    for name in cluster.servers:
        assert watch.peak_committed(name) > CAPACITY // 4
    check_unhurt(sglang)
