# SPDX-License-Identifier: Apache-2.0
"""SGLang servers whose memory saver works under the ledger."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import Models
from tests.support.elastic import check_account
from tests.support.prompts import equal_prompts
from tests.support.sglang_fixtures import check_unhurt
from tests.support.sglang_server import QUIET, SglangHost
from tests.support.sleeper import (
    MIB,
    Alone,
    SglangSleeper,
    account,
    page_bytes,
    resident_bytes,
    take_turns,
    tokens_of,
)
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

CAPACITY = 48 * MIB
CYCLES = 100
WAKE_WAIT_MS = 2000
SHORT_WAIT_MS = 300
"""Where a wake is refused again and again."""


def _sleeper(
    name: str,
    models: Models,
    folder: Path,
    host: SglangHost,
    *args: str,
    capacity: int = CAPACITY,
    wake_wait_ms: int = WAKE_WAIT_MS,
) -> SglangSleeper:
    return SglangSleeper(
        name,
        models.llama,
        folder,
        host,
        *args,
        capacity=str(capacity),
        page_size="64KiB",
        wake_wait_ms=str(wake_wait_ms),
    )


@pytest.fixture(scope="module")
def _alone(
    models: Models, sglang_patched: SglangHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("sglang-sleep")
    server = _sleeper("sleeper", models, folder, sglang_patched, QUIET)
    try:
        server.start().wait_ready()
        ledger = Ledger(folder / "ledger" / "host-0.ledger")
        alone = Alone(server, ledger, equal_prompts(4, 300, 7))
        alone.tokens = alone.ask()
        yield alone
        check_unhurt(server)
    finally:
        server.stop()


@pytest.fixture
def alone(_alone: Alone) -> Iterator[Alone]:
    """Awake before and after each test, and answering as ever."""
    yield _alone
    _alone.server.wake()
    assert _alone.ask() == _alone.tokens


def test_a_hundred_cycles(alone: Alone) -> None:
    server, ledger = alone.server, alone.ledger
    awake = account(ledger, server.name)
    assert awake.static == 16 * MIB
    asleep = None
    pages = resident = 0
    with LedgerWatch(Path(ledger.path)) as watch:
        for cycle in range(CYCLES):
            server.sleep(level=2 if cycle % 10 == 9 else 1)
            now = account(ledger, server.name)
            asleep = asleep or now
            assert now == asleep, f"cycle {cycle}"
            # All but the padding block's page.
            assert now.static == 0 and now.leased == now.committed == 64 << 10
            pages = pages or page_bytes(server)
            assert page_bytes(server) == pages, f"cycle {cycle}"
            if cycle == 10:
                resident = resident_bytes(server)
            server.wake()
            assert account(ledger, server.name).static == awake.static
            assert alone.ask() == alone.tokens, f"cycle {cycle}"
    check_account(watch)
    server.sleep()
    assert resident_bytes(server) < resident + 16 * MIB


def test_requests_that_arrive_meanwhile_wait(alone: Alone) -> None:
    """Stock SGLang would run them on memory that is not there."""
    alone.server.sleep()
    answers: list[list[list[int]]] = []
    asking = threading.Thread(target=lambda: answers.append(alone.ask()))
    asking.start()
    asking.join(timeout=1.5)
    assert asking.is_alive(), "answered while asleep"
    assert account(alone.ledger, alone.server.name).static == 0
    # A second order while requests wait is refused, and changes nothing.
    status, text = alone.server.try_sleep()
    assert status == 400 and "requests" in text
    alone.server.wake()
    asking.join(timeout=30)
    assert answers == [alone.tokens]


def test_tags(alone: Alone) -> None:
    alone.server.sleep("kv_cache")
    now = account(alone.ledger, alone.server.name)
    assert now.static == 16 * MIB and now.leased == 64 << 10
    alone.server.sleep("weights")
    assert account(alone.ledger, alone.server.name).static == 0
    alone.server.wake("weights")
    alone.server.wake("kv_cache")
    assert alone.ask() == alone.tokens
    alone.server.wake()  # again is fine


def test_dropped_weights_come_back_by_whoever_names_the_tags(alone: Alone, models: Models) -> None:
    server = alone.server
    server.sleep("kv_cache")
    server.sleep("weights", level=2)
    assert not list(server.log.parent.glob("weights/*.weights")), "there is a copy"
    server.wake("weights")
    status, text = server.post("/update_weights_from_disk", {"model_path": str(models.llama)})
    assert status == 200, text
    server.wake("kv_cache")
    assert alone.ask() == alone.tokens
    status, text = server.try_sleep(level=3)
    assert status == 400 and "level 3" in text
    assert alone.ask() == alone.tokens


def test_no_room_is_an_answer_that_says_who_has_it(alone: Alone) -> None:
    server, ledger = alone.server, alone.ledger
    server.sleep()
    before = account(ledger, server.name)
    other = ledger.join("greedy", guarantee=ledger.available())
    assert other.lease(ledger.available())
    status, text = server.try_wake()
    assert status == 503
    assert "kvcached cannot wake sleeper" in text and "greedy" in text, text
    assert account(ledger, server.name) == before
    other.leave()
    server.wake()
    assert alone.ask() == alone.tokens


def test_no_place_for_the_copy_leaves_the_engine_awake(
    models: Models, sglang_patched: SglangHost, tmp_path: Path
) -> None:
    server = _sleeper("homeless", models, tmp_path, sglang_patched)
    (tmp_path / "weights").touch()
    prompts = equal_prompts(2, 300, 7)
    try:
        server.start().wait_ready()
        expected = tokens_of(server, prompts)
        status, text = server.try_sleep()
        assert status == 400 and "kvcached cannot sleep" in text
        assert tokens_of(server, prompts) == expected
        (tmp_path / "weights").unlink()
        server.sleep()
        server.wake()
        assert tokens_of(server, prompts) == expected
    finally:
        server.stop()


def test_killed_in_its_sleep_it_holds_nothing(
    models: Models, sglang_patched: SglangHost, tmp_path: Path
) -> None:
    server = _sleeper("victim", models, tmp_path, sglang_patched)
    try:
        server.start().wait_ready()
        server.sleep()
        ledger = Ledger(tmp_path / "ledger" / "host-0.ledger")
        server.kill()
        wait_until(lambda: ledger.available() == CAPACITY, 10, "all of it is there again")
    finally:
        server.stop()


def test_two_in_turn_on_memory_for_one_and_a_half(
    models: Models, sglang_patched: SglangHost, tmp_path: Path
) -> None:
    servers = [
        _sleeper(
            name,
            models,
            tmp_path,
            sglang_patched,
            QUIET,
            capacity=32 * MIB,
            wake_wait_ms=SHORT_WAIT_MS,
        )
        for name in ("one", "two")
    ]
    prompts = equal_prompts(4, 300, 11)
    try:
        take_turns(servers, prompts, tmp_path)
        for server in servers:
            check_unhurt(server)
    finally:
        for server in servers:
            server.stop()


def test_two_ranks_sleep_and_wake_alike(
    models: Models, sglang_patched: SglangHost, tmp_path: Path
) -> None:
    server = _sleeper("ranks", models, tmp_path, sglang_patched, "--tp-size=2")
    prompts = equal_prompts(3, 200, 17)
    try:
        server.start().wait_ready()
        ledger = Ledger(tmp_path / "ledger" / "host-0.ledger")
        awake = account(ledger, "ranks")
        expected = tokens_of(server, prompts)
        for cycle in range(5):
            server.sleep(level=1 + cycle % 2)
            assert account(ledger, "ranks").static == 0
            server.wake()
            assert account(ledger, "ranks").static == awake.static
            assert tokens_of(server, prompts) == expected
        server.sleep()
        other = ledger.join("greedy")
        assert other.lease(ledger.available())
        assert server.try_wake()[0] == 503
        other.leave()
        server.wake()
        assert tokens_of(server, prompts) == expected
        check_unhurt(server)
    finally:
        server.stop()
