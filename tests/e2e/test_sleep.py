# SPDX-License-Identifier: Apache-2.0
"""vLLM servers that go to sleep and wake up, with their weights and KV cache in the ledger."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import SERVER_ARGS, Models
from tests.support.elastic import check_account
from tests.support.engines import engine_environment
from tests.support.prompts import equal_prompts
from tests.support.server import VllmHost, burst
from tests.support.sleeper import (
    MIB,
    Alone,
    Sleeper,
    account,
    page_bytes,
    resident_bytes,
    take_turns,
    tokens_of,
)
from tests.support.watch import LedgerWatch, wait_until

pytestmark = pytest.mark.timeout(600)

# A tiny Llama's weights have 16 MiB with the pages' rest; its KV cache takes 256 KiB a block.
CAPACITY = 48 * MIB
CYCLES = 100
WAKE_WAIT_MS = 2000
SHORT_WAIT_MS = 300
"""Where a wake is refused again and again."""


def _sleeper(
    name: str,
    models: Models,
    folder: Path,
    host: VllmHost,
    *args: str,
    capacity: int = CAPACITY,
    wake_wait_ms: int = WAKE_WAIT_MS,
) -> Sleeper:
    return Sleeper(
        name,
        models.llama,
        folder,
        host,
        *SERVER_ARGS,
        *args,
        capacity=str(capacity),
        wake_wait_ms=str(wake_wait_ms),
    )


@pytest.fixture(scope="module")
def _alone(
    models: Models, vllm_patched: VllmHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("sleep")
    server = _sleeper("sleeper", models, folder, vllm_patched)
    try:
        server.start().wait_ready()
        ledger = Ledger(folder / "ledger" / "host-0.ledger")
        alone = Alone(server, ledger, equal_prompts(4, 300, 7))
        alone.tokens = alone.ask()
        yield alone
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
    asleep = None
    pages = resident = 0
    with LedgerWatch(Path(ledger.path)) as watch:
        for cycle in range(CYCLES):
            server.sleep(level=2 if cycle % 10 == 9 else 1)
            assert server.sleeping
            now = account(ledger, server.name)
            asleep = asleep or now
            assert now == asleep, f"cycle {cycle}"
            assert now.static == 0
            # All but the null block's pages.
            assert now.leased == now.committed <= 256 << 10
            pages = pages or page_bytes(server)
            assert page_bytes(server) == pages, f"cycle {cycle}"
            if cycle == 10:
                resident = resident_bytes(server)
            server.wake()
            assert not server.sleeping
            assert page_bytes(server) == pages + awake.static
            assert account(ledger, server.name).static == awake.static
            assert alone.ask() == alone.tokens, f"cycle {cycle}"
    check_account(watch)
    server.sleep()
    assert resident_bytes(server) < resident + 16 * MIB


def test_requests_that_arrive_meanwhile_wait_as_in_the_engine(alone: Alone) -> None:
    alone.server.sleep()
    answers: list[list[list[int]]] = []
    asking = threading.Thread(target=lambda: answers.append(alone.ask()))
    asking.start()
    asking.join(timeout=1.5)
    assert asking.is_alive(), "answered while asleep"
    assert alone.server.sleeping
    assert account(alone.ledger, alone.server.name).static == 0
    alone.server.wake()
    asking.join(timeout=30)
    assert answers == [alone.tokens]


def test_tags_wake_a_part(alone: Alone) -> None:
    alone.server.sleep()
    alone.server.wake("weights")
    assert account(alone.ledger, alone.server.name).static > 0
    assert alone.server.sleeping
    alone.server.wake("kv_cache")
    assert not alone.server.sleeping
    assert alone.ask() == alone.tokens


def test_no_room_is_an_answer_that_says_who_has_it(alone: Alone) -> None:
    server, ledger = alone.server, alone.ledger
    for level in (1, 2):
        server.sleep(level)
        before = account(ledger, server.name)
        other = ledger.join("greedy", guarantee=ledger.available())
        assert other.lease(ledger.available())
        status, text = server.try_wake()
        assert status == 503
        assert "kvcached cannot wake sleeper" in text and "greedy" in text, text
        assert server.sleeping
        assert account(ledger, server.name) == before
        assert {m.name for m in ledger.members()} == {"sleeper", "greedy"}
        other.leave()
        server.wake()
        assert alone.ask() == alone.tokens


def test_room_kept_for_anothers_guarantee_is_none(alone: Alone) -> None:
    alone.server.sleep()
    other = alone.ledger.join("guaranteed", guarantee=alone.ledger.available())
    status, text = alone.server.try_wake()
    assert status == 503 and "guarantee" in text
    other.leave()


def test_a_wake_waits_for_room(alone: Alone) -> None:
    alone.server.sleep()
    other = alone.ledger.join("greedy")
    assert other.lease(alone.ledger.available())
    later = threading.Timer(WAKE_WAIT_MS / 2000, other.leave)
    later.start()
    alone.server.wake()
    later.join()


def test_no_place_for_the_copy_leaves_the_engine_awake(alone: Alone, models: Models) -> None:
    folder = alone.server.log.parent / "weights"
    before = account(alone.ledger, alone.server.name)
    alone.server.sleep(2)  # drops an earlier copy
    alone.server.wake()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.touch()
    try:
        status, _ = alone.server.post("/sleep?level=1", {})
        assert status >= 500
        assert account(alone.ledger, alone.server.name).static == before.static
        alone.server.wake()  # it is paused, with its weights in place
        assert alone.ask() == alone.tokens
    finally:
        folder.unlink()


def test_whatever_fails_as_it_wakes(models: Models, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.sleep_faults", str(models.llama), str(tmp_path)],
        env=engine_environment("patched"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # Pages to create and map, access to set, contents to copy; level 2 copies the buffers only.
    assert result["failures"] >= 20 and result["right"] and result["backends"] == 2


def test_killed_in_its_sleep_it_holds_nothing(
    models: Models, vllm_patched: VllmHost, tmp_path: Path
) -> None:
    server = _sleeper("victim", models, tmp_path, vllm_patched)
    try:
        server.start().wait_ready()
        server.sleep()
        assert list((tmp_path / "weights").iterdir())
        ledger = Ledger(tmp_path / "ledger" / "host-0.ledger")
        server.kill()
        wait_until(lambda: ledger.available() == CAPACITY, 10, "all of it is there again")
        assert not ledger.members()
        server.start().wait_ready()
        server.sleep()
        # Two groups of memory, and none of the dead one's files.
        assert len(list((tmp_path / "weights").iterdir())) == 2
        server.wake()
    finally:
        server.stop()


def test_two_ranks_sleep_and_wake_alike(
    models: Models, vllm_patched: VllmHost, tmp_path: Path
) -> None:
    server = _sleeper(
        "ranks",
        models,
        tmp_path,
        vllm_patched,
        "--tensor-parallel-size=2",
        wake_wait_ms=SHORT_WAIT_MS,
    )
    prompts = equal_prompts(3, 200, 17)
    try:
        server.start().wait_ready()
        ledger = Ledger(tmp_path / "ledger" / "host-0.ledger")
        awake = account(ledger, "ranks")
        expected = tokens_of(server, prompts)
        for level in (1, 2, 1):
            server.sleep(level)
            assert account(ledger, "ranks").static == 0
            other = ledger.join("greedy")
            assert other.lease(ledger.available())
            assert server.try_wake()[0] == 503
            other.leave()
            server.wake()
            assert account(ledger, "ranks").static == awake.static
            assert tokens_of(server, prompts) == expected
    finally:
        server.stop()


def test_two_in_turn_on_memory_for_one_and_a_half(
    models: Models, vllm_patched: VllmHost, tmp_path: Path
) -> None:
    weights = 16 * MIB
    capacity = weights + weights // 2 + 8 * MIB
    servers = [
        _sleeper(
            name, models, tmp_path, vllm_patched, capacity=capacity, wake_wait_ms=SHORT_WAIT_MS
        )
        for name in ("one", "two")
    ]
    prompts = equal_prompts(6, 300, 11)
    try:
        take_turns(servers, prompts, tmp_path)
    finally:
        for server in servers:
            server.stop()


def test_a_wake_takes_a_neighbours_prefix_cache(
    models: Models, vllm_patched: VllmHost, tmp_path: Path
) -> None:
    one, two = (_sleeper(name, models, tmp_path, vllm_patched) for name in ("one", "two"))
    prompts = equal_prompts(6, 300, 13)
    try:
        one.start().wait_ready()
        expected = tokens_of(one, prompts)
        one.sleep()
        two.start().wait_ready()
        ledger = Ledger(tmp_path / "ledger" / "host-0.ledger")
        for seed in range(20, 28):
            for answer in burst(two, equal_prompts(8, 1000, seed), 4):
                assert answer.status == 200, answer.error
        free = ledger.available()
        assert free < 16 * MIB, "the neighbour's cache leaves room as it is"
        one.wake()
        assert tokens_of(one, prompts) == expected
    finally:
        one.stop()
        two.stop()
