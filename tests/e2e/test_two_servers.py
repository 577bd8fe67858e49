# SPDX-License-Identifier: Apache-2.0
"""Two servers share memory that neither load alone, but their sum exceeds."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import CAPACITY, LLAMA_BATCHES, Pair, References
from tests.support.elastic import check_account
from tests.support.load import check_complete
from tests.support.prompts import Prompt, equal_prompts
from tests.support.server import Answer, at_once, burst, burst_async
from tests.support.tiny_model import LLAMA
from tests.support.watch import LedgerWatch, Peaks, check_peaks, read, wait_until

pytestmark = pytest.mark.timeout(600)

BLOCK = 128 * LLAMA.kv_bytes_per_token
# 9 blocks at the end: 36 MiB of the 48 MiB there are.
BURST, LENGTH, ANSWER = 16, 1050, 100
BURST_BYTES = BURST * 9 * BLOCK


def _prompts(seed: int) -> list[Prompt]:
    return equal_prompts(BURST, LENGTH, seed)


def test_alternating_bursts_reach_into_each_others_memory(pair: Pair) -> None:
    assert CAPACITY < 2 * BURST_BYTES
    seeds = itertools.count(100)
    both = (pair.caching, pair.plain)

    def run() -> Peaks:
        with LedgerWatch(pair.ledger) as watch:
            for server in both * 2:
                check_complete(at_once(server, _prompts(next(seeds)), ANSWER), ANSWER)
        check_account(watch)
        return Peaks([watch.peak_committed(server.name) for server in both], watch.blind_s)

    # Each got more than half, the caching one's idle cache giving way to the plain one.
    assert BURST_BYTES > CAPACITY / 2
    check_peaks(run, BURST_BYTES, CAPACITY)


def test_answers_are_right_while_both_want_more_than_there_is(
    pair: Pair, references: References
) -> None:
    expected = references["llama"].tokens
    size = len(LLAMA_BATCHES[0])
    halves = (pair.plain, LLAMA_BATCHES[0], 0), (pair.caching, LLAMA_BATCHES[1], size)

    async def both() -> list[list[Answer]]:
        return await asyncio.gather(*(burst_async(server, batch) for server, batch, _ in halves))

    with LedgerWatch(pair.ledger) as watch:
        results = asyncio.run(both())
    check_account(watch)
    for (server, _, first), answers in zip(halves, results, strict=True):
        check_complete(answers, 32)
        wrong = [i for i, a in enumerate(answers) if a.tokens != expected[first + i]]
        assert not wrong, f"{server.name} answers prompts {wrong} otherwise than the stock engine"
    # They met: together they wanted what there is.
    assert watch.peak_leased() > 0.9 * CAPACITY


def test_a_killed_servers_bytes_are_there_for_the_other(pair: Pair) -> None:
    victim, survivor = pair.caching, pair.plain
    ledger = Ledger(pair.ledger)
    load = threading.Thread(target=burst, args=(victim, _prompts(200), 2000), daemon=True)
    load.start()
    wait_until(
        lambda: read(ledger).committed[victim.name] >= BURST_BYTES // 2, 60, "the victim is loaded"
    )
    # Read before the kill: the survivor may have reaped the dead member an instant after it.
    held = {m.name: m.leased for m in ledger.members()}[victim.name]
    victim.kill()
    assert held >= BURST_BYTES // 2
    assert CAPACITY - held < BURST_BYTES, "the survivor could do without the victim's bytes"

    def run() -> Peaks:
        with LedgerWatch(pair.ledger) as watch:
            check_complete(at_once(survivor, _prompts(201), ANSWER), ANSWER)
        check_account(watch)
        return Peaks([watch.peak_committed(survivor.name)], watch.blind_s)

    check_peaks(run, BURST_BYTES, CAPACITY)
    load.join(timeout=30)
    assert victim.name not in {member.name for member in ledger.members()}
