# SPDX-License-Identifier: Apache-2.0
"""A burst of high priority takes memory from running requests, which lose nothing but time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from kvcached_core import Config
from kvcached_core.reservation import Reservation
from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account
from tests.support.load import Burst
from tests.support.prompts import equal_prompts
from tests.support.trio import CAPACITY
from tests.support.watch import LedgerWatch, longest_pause, wait_until

pytest_plugins = ["tests.support.trio"]
pytestmark = [pytest.mark.timeout(600), pytest.mark.alone]

BLOCK = 256 << 10
HELD = 11 * MIB  # kept out of the game, so that few requests fill what is left
FREE = CAPACITY - HELD
# Long requests: 20 blocks of 128 tokens when they begin, 24 when they end. Six fill the memory.
LENGTH, ANSWER, BLOCKS = 2500, 570, 20
# Urgent ones: 9 blocks each, 18 MiB together.
URGENT, URGENT_LENGTH, URGENT_ANSWER = 8, 1050, 64
# The long ones end some 2 s after they fill the memory. A run is repeated, at most twice, if
# nobody looked for so long: a busy machine may stop this process for longer.
TRIES, LASTING_S = 3, 0.5


@pytest.fixture
def held(trio: Cluster) -> Iterator[Reservation]:
    """Memory that nobody has a claim to."""
    for name in trio.servers:
        trio.set_policy(name, guarantee=0)
    config = Config.load(
        {"ledger_dir": trio.path.parent, "capacity": CAPACITY, "guarantee": HELD}, {}
    )
    with Reservation("held", config=config) as reservation:
        assert reservation.resize(HELD, timeout_s=10)
        yield reservation


@pytest.fixture
def cluster(trio: Cluster, held: Reservation) -> Cluster:
    """`large` and `middle` of no priority, `small` of some; less memory, and no guarantees."""
    assert held.bytes == HELD
    trio.set_policy("small", priority=50)
    return trio


def _leased(cluster: Cluster, name: str) -> int:
    return cluster.member(name).leased


def test_an_urgent_burst_is_served_by_preemption(cluster: Cluster) -> None:
    low, high = cluster.servers["large"], cluster.servers["small"]
    prompts = equal_prompts(6, LENGTH, seed=500)
    undisturbed = Burst(low, prompts, ANSWER).wait()
    alone_s = max(answer.seconds for answer in undisturbed)
    cluster.empty("large")  # the second run must not find the first one's prefixes

    since = cluster.last_event()
    before = cluster.member("large").counters["preemptions"]
    # Each is one block past its prompt: from then on steps are short, and asks answered in time.
    full = len(prompts) * (BLOCKS + 1) * BLOCK
    with LedgerWatch(cluster.path) as watch:
        for _ in range(TRIES):
            sent = time.monotonic()
            running = Burst(low, prompts, ANSWER)
            wait_until(lambda: _leased(cluster, "large") >= full, 60, "it is full")
            left = FREE - _leased(cluster, "large")
            begin = time.monotonic()
            burst = Burst(high, equal_prompts(URGENT, URGENT_LENGTH, seed=501), URGENT_ANSWER)
            # More than was free, and the low one has grown meanwhile.
            wait_until(
                lambda low=running, more=left + MIB: (
                    _leased(cluster, "small") >= more or not low.pending
                ),
                60,
                "the high one has more",
            )
            seen = time.monotonic()
            took = seen - begin
            # All of them began together, and are of one length: none is near its end.
            by_preemption = running.pending == len(prompts)
            burst.wait()
            served = time.monotonic() - begin
            answers = running.wait()
            if by_preemption:
                break
            looked = [sample.at for sample in watch.samples if sent < sample.at < seen]
            blind_s = longest_pause([sent, *looked, seen])
            assert blind_s >= LASTING_S, "it was not preemption that made room"
            for name in ("large", "small"):
                cluster.empty(name)
        assert by_preemption, "never watched"
    check_account(watch)
    print(
        f"{left / MIB:.1f} MiB were free, and 1 more held after {took:.2f} s; the urgent burst was "
        f"answered after {served:.2f} s; the long requests take {alone_s:.2f} s undisturbed and "
        f"{max(answer.seconds for answer in answers):.2f} s with it"
    )
    wrong = [i for i, a in enumerate(answers) if a.tokens != undisturbed[i].tokens]
    assert not wrong, f"requests {wrong} answer otherwise than undisturbed"
    # Told by the counter, by the event, and to whoever reads the engine's metrics.
    assert cluster.member("large").counters["preemptions"] > before
    events = cluster.events("preempt", "large", since)
    assert events and all(event.bytes > 0 for event in events)
    assert low.metrics()["vllm:kvcached_preemptions"] > 0
    assert cluster.member("small").counters["preemptions"] == 0


def test_a_victim_that_does_not_answer_is_passed_over(cluster: Cluster, held: Reservation) -> None:
    stopped, other, high = (cluster.servers[name] for name in ("large", "middle", "small"))
    # 8 full blocks of every prompt stay cached: 20 MiB and 10 MiB, the first asked first.
    for server, count in ((stopped, 10), (other, 5)):
        Burst(server, equal_prompts(count, URGENT_LENGTH, seed=510 + count), 8).wait()
        cached = count * 8 * BLOCK
        wait_until(
            lambda name=server.name, cached=cached: cluster.member(name).cached >= cached,
            15,
            "idle",
        )
    since = cluster.last_event()
    passed = cluster.member("large").passed_over
    given = cluster.member("middle").counters["reclaimed_bytes"]
    bursts = []
    os.killpg(stopped.pid, signal.SIGSTOP)  # all its processes
    try:
        # Too little is left for even the beginning of a prompt, so somebody has to give.
        assert held.resize(held.bytes + cluster.ledger.available() - MIB, timeout_s=10)
        cluster.set_policy("held", guarantee=held.bytes)
        frozen = _leased(cluster, "large")
        assert _leased(cluster, "middle") < frozen
        bursts.append(Burst(high, equal_prompts(URGENT, URGENT_LENGTH, seed=512), URGENT_ANSWER))
        bursts.append(Burst(stopped, equal_prompts(2, URGENT_LENGTH, seed=513), URGENT_ANSWER))
        wait_until(lambda: bool(cluster.events("passed_over", "large", since)), 60, "reported")
        assert cluster.member("large").passed_over > passed
        bursts[0].wait()
        assert _leased(cluster, "large") == frozen and bursts[1].pending == 2
        assert cluster.member("middle").counters["reclaimed_bytes"] >= given + 8 * MIB
    finally:
        os.killpg(stopped.pid, signal.SIGCONT)
    bursts[1].wait()
