# SPDX-License-Identifier: Apache-2.0
"""Physical memory rises with the load and falls after it, by the ledger and by the kernel."""

from __future__ import annotations

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import SERVER_PAGE, SERVER_PARKED, Pair
from tests.support.elastic import check_account
from tests.support.load import check_complete
from tests.support.prompts import equal_prompts
from tests.support.server import Server, at_once, burst
from tests.support.tiny_model import LLAMA
from tests.support.watch import (
    LedgerWatch,
    Peaks,
    RealMemory,
    check_peaks,
    page_memory,
    process_tree,
    read,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)

FLOOR = SERVER_PAGE + SERVER_PARKED  # The null block's page, and what may stay parked.


def _held(pair: Pair, server: Server) -> tuple[int, int, int]:
    """Bytes leased, committed, and really there."""
    sample = read(Ledger(pair.ledger))
    real = page_memory(process_tree(server.pid))
    return sample.leased[server.name], sample.committed[server.name], real


def _at_floor(pair: Pair, server: Server) -> bool:
    leased, committed, real = _held(pair, server)
    return committed == leased <= FLOOR and real == committed


@pytest.mark.parametrize("requests", [4, 16])
def test_rises_with_load_and_falls_to_the_floor(pair: Pair, requests: int) -> None:
    server = pair.plain
    wait_until(lambda: _at_floor(pair, server), 15, "at the floor before the load")
    length, answer = 800, 340
    prompts = equal_prompts(requests, length, seed=requests)

    def run() -> Peaks:
        with LedgerWatch(pair.ledger) as watch, RealMemory(server.pid) as real:
            check_complete(at_once(server, prompts, answer), answer)
        check_account(watch)
        seen = (watch.peak_committed(server.name), real.peak)
        return Peaks(seen, max(watch.blind_s, real.blind_s))

    # All requests run at once, each in blocks of 128 tokens, one page each. The last block is taken
    # 114 tokens before the end: a request that is computed later still meets all others.
    block = 128 * LLAMA.kv_bytes_per_token
    needed = requests * -(-(length + answer - 1) // 128) * block
    check_peaks(run, needed, needed + FLOOR)
    wait_until(lambda: _at_floor(pair, server), 15, "back at the floor after the load")


def test_an_unused_prefix_cache_stays_until_it_is_needed(pair: Pair) -> None:
    server = pair.caching
    prompts = equal_prompts(8, 1000, seed=77)
    first = burst(server, prompts, max_tokens=8)
    # 7 full blocks of each prompt are worth keeping.
    cached = 8 * 7 * 128 * LLAMA.kv_bytes_per_token
    assert read(Ledger(pair.ledger)).committed[server.name] >= cached
    hits = server.metrics()["vllm:prefix_cache_hits_total"]
    again = burst(server, prompts, max_tokens=8)
    assert [a.tokens for a in again] == [a.tokens for a in first]
    wait_until(
        lambda: server.metrics()["vllm:prefix_cache_hits_total"] >= hits + 8 * 7 * 128,
        5,
        "answers from the prefix cache",
    )
