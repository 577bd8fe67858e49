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
# Moving every page of every request between the servers once would be PAGES a request. Half of
# that says that most memory a request leaves is used again where it is.
MOST_PAGES = PAGES / 2


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
        before = [len(load.answers) for load in loads]
        begin = time.monotonic()
        while time.monotonic() < begin + SECONDS:
            for name in NAMES:
                samples[name].append(trio.member(name))
            time.sleep(0.05)
        done = [len(load.answers) - count for load, count in zip(loads, before, strict=True)]
        pages = _decommitted(trio) - pages
    check_account(watch)
    shares = {name: statistics.mean(info.leased for info in samples[name]) for name in NAMES}
    print(
        f"{done} requests in {SECONDS:.0f} s; {pages / sum(done):.2f} pages decommitted a request "
        f"of {PAGES}; held {[f'{share / MIB:.1f} MiB' for share in shares.values()]} on average"
    )
    # It was contention all along: in passes that could have run more, requests had to wait.
    for name in NAMES:
        waiting = sum(info.waiting > 0 for info in samples[name])
        assert waiting >= len(samples[name]) / 4, f"{name} hardly waited"
    # Of equal weight, they hold alike; what finished requests leave goes to who has less.
    assert min(shares.values()) >= 0.4 * sum(shares.values()), shares
    assert min(done) >= sum(done) / 4, f"one of them starves: {done}"
    assert pages <= MOST_PAGES * sum(done), "pages are moved to and fro"
