# SPDX-License-Identifier: Apache-2.0
"""A vLLM and an SGLang server share memory that either needs more than half of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import SERVER_ARGS, Models
from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account
from tests.support.load import check_complete
from tests.support.prompts import equal_prompts
from tests.support.server import Answer, burst
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
    models: Models, sglang_patched: SglangHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("beside")
    cluster = Cluster(models.llama, folder, CAPACITY, SERVER_ARGS)
    cluster.server("vllm")
    cluster.servers["sglang"] = SglangServer(
        "sglang", models.llama, folder, (), cluster.env("sglang"), host=sglang_patched
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def test_bursts_in_turn_reach_into_each_others_memory(cluster: Cluster) -> None:
    prompts = equal_prompts(BURST, LENGTH, 77)
    sglang = cluster.servers["sglang"]
    assert isinstance(sglang, SglangServer)
    answers: dict[str, list[Answer]] = {}
    with LedgerWatch(cluster.path) as watch:
        for name in ("vllm", "sglang", "vllm", "sglang"):
            found = burst(cluster.servers[name], prompts, ANSWER)
            check_complete(found, ANSWER)
            before = answers.setdefault(name, found)
            # What was evicted for the other is computed anew, to the same end.
            equal = sum(a.tokens == b.tokens for a, b in zip(before, found, strict=True))
            assert equal >= BURST - 1  # a tie may go either way in another batch
    check_account(watch)
    # Either keeps its prefix cache until the other asks, so each took more than half back.
    for name in cluster.servers:
        assert watch.peak_committed(name) > MOST
        assert cluster.member(name).counters["reclaimed_bytes"] > 0
    check_unhurt(sglang)
