# SPDX-License-Identifier: Apache-2.0
"""Models with sliding windows: two pools, of all tokens and of windows, on one account.

The reference is the stock engine with one pool, in which windows are only masked: its own backend
for the CPU reads window layers at the wrong slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcached_core import Ledger
from kvcached_core._core import MemberInfo
from tests.e2e.conftest import Models
from tests.support.elastic import NAME, check_account, elastic_env, ledger_path
from tests.support.load import Burst
from tests.support.prompts import equal_prompts
from tests.support.server import burst
from tests.support.sglang_fixtures import (
    GROWING,
    References,
    Scored,
    Serve,
    ask_stock,
    retracted,
    wait_retracted,
)
from tests.support.sglang_server import SglangHost, SglangServer
from tests.support.tiny_model import COHERE2
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
PAGE = 64 << 10
FULL = COHERE2.kv_bytes_per_token // 4  # one layer of four
WINDOW = COHERE2.kv_bytes_per_token - FULL
EAGER = "--disable-prefill-cuda-graph"
"""Else chunks are as large as a graph, which the CPU cannot have."""


@pytest.fixture(scope="module")
def _answers(
    models: Models, sglang_stock: SglangHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[References]]:
    folder = tmp_path_factory.mktemp("sglang-windows-stock")
    args = ["--max-total-tokens=60000", "--disable-hybrid-swa-memory"]
    server = Scored("stock", models.cohere, folder, args, {}, "stock", host=sglang_stock)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(ask_stock, server, growing=(GROWING[:8], 80))


@pytest.fixture
def references(_answers: Future[References]) -> Callable[[], References]:
    return _answers.result


def _member(folder: Path) -> MemberInfo:
    (info,) = Ledger(ledger_path(folder)).members()
    assert info.name == NAME
    return info


@pytest.mark.parametrize(
    "args",
    [
        ("--chunked-prefill-size=256",),
        ("--page-size=1", "--chunked-prefill-size=-1"),
        ("--disable-radix-cache", "--chunked-prefill-size=128", "--disable-overlap-schedule"),
    ],
    ids=["cache", "slots-whole-prompts", "no-cache-no-overlap"],
)
def test_tokens_are_those_of_stock_as_memory_comes_and_goes(
    args: tuple[str, ...],
    models: Models,
    serve: Serve,
    references: Callable[[], References],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "ledger"
    # All that requests take at once, and no more: checks look at every slot there could be.
    env = elastic_env(folder, capacity="32MiB")
    caches = "--disable-radix-cache" not in args
    expected = references()  # before it starts: an idle engine keeps a core busy
    with (
        LedgerWatch(ledger_path(folder)) as watch,
        serve("engine", (EAGER, *args), env, models.cohere) as server,
    ):
        mixed = expected.mixed.part(0, 10, expected.mixed.max_tokens)
        for _ in range(2):
            mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
        _check_under_moving_limit(server, expected, Ledger(watch.path), caches)
    check_account(watch)


def _check_under_moving_limit(
    server: SglangServer, references: References, ledger: Ledger, caches: bool
) -> None:
    def leased() -> int:
        (info,) = ledger.members()
        return info.leased

    (info,) = ledger.members()
    growing = references.growing
    prompt_bytes = COHERE2.kv_bytes_per_token * len(growing.prompts) * len(growing.prompts[0])
    ledger.trim(info.slot, info.generation, -1, cached=True)
    wait_until(lambda: leased() <= 2 * PAGE, 15, "idle and empty")
    before = retracted(server)
    running = Burst(server, growing.prompts, growing.max_tokens)
    # They pass their windows, so all they ever hold is little more than their prompts' share.
    low = prompt_bytes // 2
    wait_until(lambda: leased() > low, 60, "all run")
    ledger.set_policy(info.slot, info.generation, limit=low // 2)
    wait_retracted(server, before)
    wait_until(lambda: leased() <= low // 2, 30, "within its limit")
    assert running.pending > len(growing.prompts) // 2, "the limit came too late to matter"
    ledger.set_policy(info.slot, info.generation, limit=-1)
    growing.check(running.wait())
    wait_until(lambda: caches or leased() <= 2 * PAGE, 15, "gives everything back when idle")


def test_what_lies_behind_the_window_is_given_back(
    models: Models, serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "ledger"
    args = (EAGER, "--disable-radix-cache", "--chunked-prefill-size=128")
    length, answer = 2400, 60
    with serve("engine", args, elastic_env(folder, capacity="32MiB"), models.cohere) as server:
        with LedgerWatch(ledger_path(folder)) as watch:
            Burst(server, equal_prompts(1, length, seed=1), answer).wait()
            Burst(server, equal_prompts(1, 40, seed=2), 400).wait()
        wait_until(lambda: _member(folder).leased <= 2 * PAGE, 15, "back at the floor")
    check_account(watch)
    all_tokens = (length + answer) * FULL
    # The window, a chunk in flight and one that is planned, in pages of memory.
    windows = (COHERE2.sliding_window + 3 * 128) * WINDOW + 8 * PAGE
    assert all_tokens <= watch.peak_committed(NAME) <= all_tokens + windows
    assert windows < length * WINDOW / 3, "this could not fail"


def test_cached_windows_make_room_for_the_rest_of_a_long_prompt(
    models: Models, serve: Serve, tmp_path: Path
) -> None:
    """The pool that is short gets what the other caches, though nobody else asks for it."""
    folder = tmp_path / "ledger"
    length, answer = 3000, 200
    # All tokens fit, and a part of the windows.
    env = elastic_env(folder, capacity="3MiB")
    needed = (length + answer) * FULL
    assert needed + (COHERE2.sliding_window + 2 * 256) * WINDOW < 3 * MIB < 3000 * (FULL + WINDOW)
    with serve("engine", (EAGER, "--chunked-prefill-size=256"), env, models.cohere) as server:
        with LedgerWatch(ledger_path(folder)) as watch:
            first = burst(server, equal_prompts(1, length, seed=3), answer)
            again = burst(server, equal_prompts(1, length, seed=3), answer)
        assert len(first[0].tokens) == answer and first[0].tokens == again[0].tokens
    check_account(watch)


def test_a_cache_of_both_pools_is_bounded_trimmed_and_asked_for(
    models: Models, serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "ledger"
    env = elastic_env(folder, capacity="24MiB")
    args = (EAGER, "--chunked-prefill-size=512")
    with serve("engine", args, env, models.cohere) as server:
        ledger = Ledger(ledger_path(folder))
        prompts = equal_prompts(16, 480, seed=4)
        first = burst(server, prompts, 4)
        # All tokens in whole blocks, and the windows of at least the last ones.
        wait_until(lambda: _member(folder).cached >= 16 * 464 * FULL, 15, "told what is cached")
        before = _member(folder)
        assert before.cached >= 12 * MIB
        neighbour = ledger.join("neighbour")
        try:
            wanted = 20 * MIB
            neighbour.set_demand(wanted, 1)
            neighbour.ask()
            wait_until(lambda: neighbour.claimable() >= wanted, 15, "its cache is given")
        finally:
            neighbour.leave()
        member = next(m for m in ledger.members() if m.name == NAME)
        assert 0 < member.leased <= 4 * MIB
        assert member.passed_over == 0
        assert [a.tokens for a in burst(server, prompts, 4)] == [a.tokens for a in first]
        wait_until(lambda: _member(folder).cached >= 16 * 464 * FULL, 15, "it is cached again")
        ledger.set_policy(member.slot, member.generation, cache_limit=4 * MIB)
        wait_until(lambda: _member(folder).cached <= 4 * MIB, 15, "bounded")
        assert _member(folder).cached >= MIB
        ledger.trim(member.slot, member.generation, -1, cached=True)
        wait_until(lambda: _member(folder).leased == 2 * PAGE, 15, "trimmed to its null blocks")
        assert [a.tokens for a in burst(server, prompts, 4)] == [a.tokens for a in first]
