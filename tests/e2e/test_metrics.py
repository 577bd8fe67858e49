# SPDX-License-Identifier: Apache-2.0
"""What an operator sees on /metrics: the bytes behind the virtual cache, and a true usage."""

from __future__ import annotations

import threading
import time

import pytest

from kvcached_core.metrics import GAUGES
from tests.e2e.conftest import CAPACITY, SERVER_PAGE, SERVER_PARKED, Pair
from tests.support.prompts import equal_prompts
from tests.support.server import Server, burst

pytestmark = pytest.mark.timeout(600)

USAGE = "vllm:kv_cache_usage_perc"


def test_series_follow_a_burst(pair: Pair) -> None:
    server = pair.plain
    seen: list[dict[str, float]] = []
    answers: list[int] = []

    def load() -> None:
        prompts = equal_prompts(12, 900, seed=31)
        answers.extend(answer.status for answer in burst(server, prompts, max_tokens=300))

    thread = threading.Thread(target=load)
    thread.start()
    while thread.is_alive():
        seen.append(server.metrics())
    thread.join()
    assert answers == [200] * 12

    for page in seen:
        assert {f"vllm:kvcached_{name}" for name in GAUGES} <= page.keys()
        assert 0.0 <= page[USAGE] <= 1.0
        assert page["vllm:kvcached_capacity_bytes"] in (0, CAPACITY)  # 0 until the first step.
        assert page["vllm:kvcached_committed_bytes"] <= CAPACITY
    # 12 requests of 900 tokens and more hold 8 blocks each, 24 MiB together, and for long enough to
    # be seen by a busy machine as well.
    assert max(page["vllm:kvcached_committed_bytes"] for page in seen) >= 20 << 20
    assert max(page[USAGE] for page in seen) > 0.4

    for name in ("committed_pages", "decommitted_pages"):
        assert _idle(server)[f"vllm:kvcached_{name}"] > 0


def test_an_idle_page_is_true_every_time(pair: Pair) -> None:
    # What a worker frees in the background after the last step must reach the page all the same.
    for turn in range(5):
        burst(pair.plain, equal_prompts(6 + turn, 900, seed=40 + turn), max_tokens=16)
        _idle(pair.plain)


def _idle(server: Server) -> dict[str, float]:
    """The page once it shows an idle server, which it does without a further request."""
    end = time.monotonic() + 15
    while True:
        page = server.metrics()
        committed = page["vllm:kvcached_committed_bytes"]
        if page[USAGE] < 0.02 and committed <= SERVER_PAGE + SERVER_PARKED:
            return page
        assert time.monotonic() < end, f"idle, and still usage {page[USAGE]}, {committed} committed"
        time.sleep(0.1)
