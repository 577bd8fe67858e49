# SPDX-License-Identifier: Apache-2.0
"""SGLang's physical memory follows its load and the operator's orders, asleep or awake."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_core._core import Member
from kvcached_core.cli import kvctl
from kvcached_core.metrics import GAUGES
from tests.e2e.conftest import Models
from tests.support.cluster import MIB, Cluster
from tests.support.elastic import check_account, elastic_env
from tests.support.load import Burst, check_complete
from tests.support.prompts import equal_prompts
from tests.support.server import HttpServer, at_once, burst
from tests.support.sglang_fixtures import (
    References,
    Serve,
    check_unhurt,
    retracted,
    wait_retracted,
)
from tests.support.sglang_server import SglangHost, SglangServer
from tests.support.watch import (
    LedgerWatch,
    Peaks,
    RealMemory,
    check_peaks,
    page_memory,
    process_tree,
    wait_until,
)

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

CAPACITY = 24 * MIB
TOKEN = 2048
BLOCK = 16 * TOKEN
PAGE = 2 * BLOCK
PARKED = 4 * PAGE
FLOOR = PAGE + PARKED  # The padding block's page, and what may stay parked.
NAMES = ("awake", "asleep")


@pytest.fixture(scope="module")
def _servers(
    models: Models,
    sglang_references: Callable[[], References],  # are made meanwhile
    sglang_patched: SglangHost,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    cluster = Cluster(models.llama, tmp_path_factory.mktemp("sglang-memory"), CAPACITY, ())
    # The first as a user starts it; idle, it polls.
    for name, host in (("awake", None), ("asleep", sglang_patched)):
        settings = {"page_size": str(PAGE), "parked": str(PARKED), "parked_decay_ms": "200"}
        env = cluster.env(name, **settings)
        cluster.servers[name] = SglangServer(name, models.llama, cluster.folder, (), env, host=host)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(_servers: Cluster) -> Iterator[Cluster]:
    """Both servers idle and empty, without any policy."""
    for name in NAMES:
        wait_until(lambda name=name: _servers.member(name).demand == 0, 30, f"{name} is idle")
        _servers.set_policy(name, limit=-1, cache_limit=-1)
        _servers.empty(name)
    yield _servers
    for server in _servers.servers.values():
        assert isinstance(server, SglangServer)
        check_unhurt(server)


@pytest.fixture
def references(sglang_references: Callable[[], References]) -> References:
    return sglang_references()


def _sglang(cluster: Cluster, name: str) -> SglangServer:
    server = cluster.servers[name]
    assert isinstance(server, SglangServer)
    return server


def _order(cluster: Cluster, *words: str) -> None:
    """An operator's command, carried out and acknowledged."""
    options = ("--ledger-dir", str(cluster.path.parent), "--timeout", "20s")
    assert kvctl.main([*words, *options]) == 0


def _leased(cluster: Cluster, name: str) -> int:
    return cluster.member(name).leased


def _real(server: HttpServer) -> int:
    return page_memory(process_tree(server.pid))


@pytest.mark.parametrize("name", NAMES)
def test_rises_with_load_and_falls_to_the_floor(cluster: Cluster, name: str) -> None:
    server = cluster.servers[name]
    _order(cluster, "cache", name, "0")
    requests, length, answer = 12, 500, 77
    prompts = equal_prompts(requests, length, seed=1)

    def run() -> Peaks:
        with LedgerWatch(cluster.path) as watch, RealMemory(server.pid) as real:
            check_complete(at_once(server, prompts, answer), answer)
        check_account(watch)
        seen = (watch.peak_committed(name), real.peak)
        return Peaks(seen, max(watch.blind_s, real.blind_s))

    # All requests run at once, each in blocks of 16 tokens, and hold the last one for 16 tokens.
    needed = requests * -(-(length + answer - 1) // 16) * BLOCK
    # The last prefill asks for a block more for each of its requests than they fill.
    check_peaks(run, needed, needed + requests * BLOCK + FLOOR)

    def at_floor() -> bool:
        info = cluster.member(name)
        return info.leased == info.committed <= FLOOR and _real(server) == info.committed

    wait_until(at_floor, 15, "back at the floor after the load")


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_cache_is_held_until_it_is_bounded_or_trimmed(cluster: Cluster, name: str) -> None:
    server = _sglang(cluster, name)
    prompts = equal_prompts(10, 480, seed=2)
    first = Burst(server, prompts, 8).wait()
    # 30 full blocks each.
    cached = 10 * 30 * BLOCK
    wait_until(lambda: cluster.member(name).cached >= cached, 15, "told what is cached")
    time.sleep(0.5)
    assert _leased(cluster, name) >= cached
    hits = server.metrics().get("sglang:cached_tokens_total", 0)
    assert [a.tokens for a in burst(server, prompts, 8)] == [a.tokens for a in first]
    # All but the last token of each, in whole blocks.
    assert server.metrics()["sglang:cached_tokens_total"] >= hits + 10 * 464

    _order(cluster, "cache", name, "4MiB")
    assert MIB <= cluster.member(name).cached <= 4 * MIB
    wait_until(lambda: _leased(cluster, name) <= 4 * MIB + FLOOR + 10 * PAGE, 15, "bounded")
    assert [a.tokens for a in burst(server, prompts, 8)] == [a.tokens for a in first]

    _order(cluster, "trim", name, "--cached")
    assert cluster.member(name).cached == 0
    assert _leased(cluster, name) == cluster.member(name).committed == PAGE == _real(server)


def test_nothing_cached_goes_while_there_is_memory(cluster: Cluster) -> None:
    server = cluster.servers["awake"]
    length, answer, blocks = 460, 64, 0
    # Those that run later take blocks as they are decoded, beside what the earlier ones left.
    for turn, requests in enumerate((2, 10, 5)):
        Burst(server, equal_prompts(requests, length, seed=30 + turn), answer).wait()
        blocks += requests * ((length + answer - 1) // 16)
        wait_until(
            lambda most=blocks: cluster.member("awake").cached >= most * BLOCK,
            15,
            "all that was computed is cached",
        )


@pytest.mark.parametrize("name", NAMES)
def test_orders_to_an_idle_server_take_effect_at_once(cluster: Cluster, name: str) -> None:
    server = cluster.servers[name]
    Burst(server, equal_prompts(16, 480, seed=3), 4).wait()
    wait_until(lambda: cluster.member(name).cached >= 14 * MIB, 5, "it keeps what it computed")
    time.sleep(1.2)  # by now it sleeps, if it does
    begin = time.monotonic()
    for limit in (12, 10, 8, 6, 4, 2):
        _order(cluster, "limit", name, f"{limit}MiB")
        assert _leased(cluster, name) <= limit * MIB
    # A sleeper that is not woken looks around once a second.
    assert time.monotonic() - begin < 4, "orders were heard late"
    _order(cluster, "limit", name, "none")


def test_a_flushed_cache_goes_back(cluster: Cluster) -> None:
    server = cluster.servers["awake"]
    Burst(server, equal_prompts(8, 480, seed=6), 4).wait()
    assert _leased(cluster, "awake") >= 7 * MIB
    wait_until(lambda: server.post("/flush_cache", {})[0] == 200, 15, "it is idle, and flushes")
    wait_until(lambda: _leased(cluster, "awake") <= FLOOR, 15, "given back")
    # And it goes on as before.
    Burst(server, equal_prompts(8, 480, seed=6), 4).wait()


def test_aborted_requests_give_their_memory_back(cluster: Cluster) -> None:
    server = cluster.servers["awake"]
    _order(cluster, "cache", "awake", "0")
    thread = threading.Thread(
        target=burst, args=(server, equal_prompts(8, 480, seed=7), 3000), daemon=True
    )
    thread.start()
    wait_until(lambda: _leased(cluster, "awake") >= 8 * 480 * TOKEN, 60, "all run")
    server.post("/abort_request", {"rid": "", "abort_all": True})
    thread.join(timeout=60)
    assert not thread.is_alive(), "aborted requests were left unanswered"
    wait_until(lambda: _leased(cluster, "awake") <= FLOOR, 15, "given back")


def test_metrics_tell_what_is_held(cluster: Cluster, references: References) -> None:
    server = cluster.servers["awake"]
    Burst(server, equal_prompts(8, 480, seed=8), 4).wait()
    metrics = server.metrics()
    # Counters of retractions and the like are there once they count.
    assert not references.series - metrics.keys(), "stock series are missing"
    assert {f"sglang:kvcached_{name}" for name in GAUGES} <= metrics.keys()
    assert metrics["sglang:kvcached_capacity_bytes"] == CAPACITY

    def agree() -> bool:
        told, info = server.metrics(), cluster.member("awake")
        return all(
            told[f"sglang:kvcached_{name}_bytes"] == getattr(info, name)
            for name in ("leased", "committed", "cached", "parked")
        )

    wait_until(agree, 15, "/metrics says what the ledger says")
    assert cluster.member("awake").cached >= 7 * MIB


def test_a_limit_lowered_under_load(cluster: Cluster, references: References) -> None:
    server = _sglang(cluster, "awake")
    prompts, answer = references.growing.prompts, references.growing.max_tokens
    prompt_bytes = len(prompts) * len(prompts[0]) * TOKEN
    before = retracted(server)
    with LedgerWatch(cluster.path) as watch:
        running = Burst(server, prompts, answer)
        wait_until(lambda: _leased(cluster, "awake") >= prompt_bytes, 60, "all run")
        _order(cluster, "limit", "awake", "2MiB")
        lowered = time.monotonic()
        wait_retracted(server, before)
        time.sleep(1.0)
        assert running.pending > 0
        raised = time.monotonic()
        _order(cluster, "limit", "awake", "none")
        references.growing.check(running.wait())
    check_account(watch)
    between = [s.leased["awake"] for s in watch.samples if lowered <= s.at < raised]
    assert max(between) <= 2 * MIB
    assert cluster.member("awake").counters["preemptions"] > 0


def test_a_request_that_loses_all_its_memory_waits(
    cluster: Cluster, references: References
) -> None:
    server = _sglang(cluster, "awake")
    one = references.growing.part(0, 1, references.growing.max_tokens)
    running = Burst(server, one.prompts, one.max_tokens)
    wait_until(lambda: _leased(cluster, "awake") >= 200 * TOKEN, 60, "it runs")
    before = retracted(server)
    _order(cluster, "limit", "awake", "192KiB")
    wait_retracted(server, before)
    time.sleep(0.5)
    assert running.pending == 1 and _leased(cluster, "awake") <= 192 << 10
    _order(cluster, "limit", "awake", "none")
    one.check(running.wait())


def test_a_request_waits_for_what_a_neighbour_holds(
    cluster: Cluster, references: References
) -> None:
    server = cluster.servers["awake"]
    mixed = references.mixed
    index = max(range(len(mixed.prompts)), key=lambda index: len(mixed.prompts[index]))
    longest = mixed.part(index, index + 1, mixed.max_tokens)
    needed = len(longest.prompts[0]) * TOKEN
    neighbour: Member = cluster.ledger.join("neighbour")
    try:
        assert neighbour.lease(cluster.ledger.available() - needed // 2)
        waiting = Burst(server, longest.prompts, longest.max_tokens)
        wait_until(lambda: cluster.member("awake").demand > 0, 15, "it says what it waits for")
        time.sleep(1.0)
        assert waiting.pending == 1
        neighbour.release(neighbour.info().leased)
        answers = waiting.wait(60)
    finally:
        neighbour.leave()
    longest.check(answers)
    wait_until(lambda: cluster.member("awake").demand == 0, 15, "it waits no longer")


def test_a_sleeper_gives_its_cache(cluster: Cluster) -> None:
    awake, asleep = (cluster.servers[name] for name in NAMES)
    Burst(asleep, equal_prompts(16, 480, seed=4), 4).wait()
    # The answers come a moment before the pass that tells of it.
    wait_until(lambda: cluster.member("asleep").cached >= 14 * MIB, 5, "it keeps what it computed")
    time.sleep(1.2)  # by now it sleeps
    with LedgerWatch(cluster.path) as watch:
        Burst(awake, equal_prompts(18, 480, seed=5), 96).wait()
    check_account(watch)
    assert watch.peak_committed("awake") >= 18 * 575 * TOKEN > CAPACITY - 14 * MIB
    assert cluster.member("asleep").counters["reclaimed_bytes"] >= 10 * MIB
    assert cluster.member("asleep").passed_over == 0


def test_what_is_accepted_is_answered(serve: Serve, tmp_path: Path) -> None:
    """Nobody waits for memory that can never be there, though there is little."""
    env = elastic_env(tmp_path / "ledger", capacity="1MiB", page_size=str(PAGE))
    with serve("small", (), env) as server:
        for turn, length in enumerate((100, 37, 260)):  # leave a cache in pieces
            Burst(server, equal_prompts(1, length, seed=20 + turn), 5).wait()
        path, body = server.request([9] * 4000, 1)
        status, text = server.post(path, body)
        assert status == 400
        found = re.search(r"maximum allowed length \((\d+) tokens\)", text)
        assert found is not None, text
        most = int(found[1]) - 1  # refuses so many, too
        assert most >= 400
        for length, answer in ((most, 1), (most, 100), (most - 1, 50), (most - 20, 100)):
            path, body = server.request([9] * length, answer)
            status, text = server.post(path, body, timeout_s=30)
            assert status == 200, text
