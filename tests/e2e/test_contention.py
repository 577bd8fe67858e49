# SPDX-License-Identifier: Apache-2.0
"""Two servers that always want more than there is: both go on, and pages do not fly about."""

from __future__ import annotations

import statistics
import time

import pytest

from kvcached_core._core import MemberInfo
from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account
from tests.support.load import SteadyLoad
from tests.support.trio import CAPACITY
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.trio"]
pytestmark = [pytest.mark.timeout(600), pytest.mark.alone]

NAMES = ("large", "middle")
LENGTH, ANSWER = 1050, 64
PAGE = 256 << 10
PAGES = 9  # of one request, a block each
# 76.5 MiB each. Whatever share of the memory one has, more than half of it is waited for.
IN_FLIGHT = 34
SECONDS = 20.0
# Of each server, however little of the processor it gets: two batches of what fits a half.
LEAST_DONE = 2 * (CAPACITY // 2 // (PAGES * PAGE))
# Moving every page of every request between the servers once would be PAGES a request. Half of
# that says that most memory a request leaves is used again where it is.
MOST_PAGES = PAGES / 2
COUNTED = (
    "vllm:iteration_tokens_total_count",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
)


def _counts(cluster: Cluster) -> dict[str, list[float]]:
    """Of each server: steps, tokens generated and preemptions."""
    metrics = {name: cluster.servers[name].metrics() for name in NAMES}
    return {name: [metrics[name][series] for series in COUNTED] for name in NAMES}


def _decommitted(cluster: Cluster) -> int:
    return sum(cluster.member(name).counters["decommits"] for name in NAMES)


def test_permanent_contention(trio: Cluster) -> None:
    for name in trio.servers:
        trio.set_policy(name, guarantee=0)
    assert IN_FLIGHT * PAGES * PAGE >= CAPACITY + CAPACITY // 2
    samples: dict[str, list[MemberInfo]] = {name: [] for name in NAMES}
    with (
        LedgerWatch(trio.path) as watch,
        SteadyLoad(trio.servers["large"], IN_FLIGHT, LENGTH, ANSWER, 700) as first,
        SteadyLoad(trio.servers["middle"], IN_FLIGHT, LENGTH, ANSWER, 701) as second,
    ):
        loads = (first, second)
        wait_until(lambda: all(len(load.answers) >= 3 for load in loads), 120, "both are busy")
        pages = _decommitted(trio)
        counts = _counts(trio)
        before = [len(load.answers) for load in loads]
        begin = time.monotonic()

        def done() -> list[int]:
            return [len(load.answers) - count for load, count in zip(loads, before, strict=True)]

        while (seconds := time.monotonic() - begin) < SECONDS or min(done()) < LEAST_DONE:
            assert seconds < 120, f"one of them starves: {done()}"
            for name in NAMES:
                samples[name].append(trio.member(name))
            time.sleep(0.05)
        requests = sum(done())
        print(f"{done()} requests in {seconds:.0f} s")
        counts = {
            name: [now - then for now, then in zip(after, counts[name], strict=True)]
            for name, after in _counts(trio).items()
        }
        pages = _decommitted(trio) - pages
    check_account(watch)
    shares = {name: statistics.mean(info.leased for info in samples[name]) for name in NAMES}
    batches = {name: tokens / steps for name, (steps, tokens, _) in counts.items()}
    print(
        f"{pages / requests:.2f} pages decommitted a request of {PAGES}; on average they held "
        f"{[f'{share / MIB:.1f} MiB' for share in shares.values()]} "
        f"and ran {[f'{batch:.1f}' for batch in batches.values()]} requests a step"
    )
    # It was contention all along: in passes that could have run more, requests had to wait.
    for name in NAMES:
        waiting = sum(info.waiting > 0 for info in samples[name])
        assert waiting >= len(samples[name]) / 4, f"{name} hardly waited"
    # Of equal weight, they hold alike; what finished requests leave goes to who has less. And they
    # use what they hold: how many steps each makes of it is for the processor to say, not for us.
    assert min(shares.values()) >= 0.4 * sum(shares.values()), shares
    assert min(batches.values()) >= 0.4 * sum(batches.values()), batches
    assert not any(preempted for _, _, preempted in counts.values()), counts
    assert pages <= MOST_PAGES * requests, "pages are moved to and fro"
