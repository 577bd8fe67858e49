# SPDX-License-Identifier: Apache-2.0
"""Models with recurrent layers: tokens in one pool and states in another, on one account.

The model's layers are attention and short convolutions in turns, the one recurrent kind whose
kernels run on a CPU: Triton's interpreter runs them, slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core import Ledger
from kvcached_core._core import MemberInfo
from tests.e2e.conftest import Models
from tests.support.elastic import NAME, check_account, elastic_env, ledger_path
from tests.support.engines import Flavor
from tests.support.load import Burst
from tests.support.prompts import equal_prompts
from tests.support.server import burst
from tests.support.sglang_fixtures import (
    Reference,
    Scored,
    ask,
    check_unhurt,
    retracted,
    wait_retracted,
)
from tests.support.sglang_server import SglangHost, SglangServer, sglang_environment
from tests.support.tiny_model import LFM2
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

PAGE = 4 << 10
FLOOR = PAGE + LFM2.layers // 2 * PAGE
"""A null block's page of tokens, and one in every layer with states."""
SLOTS = 3
"""Of states that SGLang keeps for a request."""
KERNELS = str(Path(__file__).parents[1] / "support" / "cpu_kernels")
ARGS = ("--disable-prefill-cuda-graph", "--max-mamba-cache-size=90")
PROMPTS = [prompt for n in (5, 17, 40, 64, 90) for prompt in equal_prompts(2, n, seed=n)]
LONGER = [[*prompt, 11, 12, 13] for prompt in PROMPTS]
"""A request begins with a cached state only where one was left: at the end of a prompt, say."""
GROWING = equal_prompts(10, 48, seed=7)


def _environment(flavor: Flavor, **changes: str) -> dict[str, str]:
    path = sglang_environment(flavor)["PYTHONPATH"]
    # Else what a state is rounded to depends on where a prompt is cut.
    exact = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}
    return changes | exact | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{path}:{KERNELS}"}


class Started:
    """Servers of the tiny recurrent model, which need processes of their own to be forks of: the
    interpreter is chosen when Triton is imported.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._hosts: list[SglangHost] = []

    def _host(self, flavor: Flavor) -> SglangHost:
        folder = self._folder / f"{flavor}-host"
        folder.mkdir()
        self._hosts.append(SglangHost(flavor, folder, _environment(flavor)))
        return self._hosts[-1]

    def close(self) -> None:
        for host in self._hosts:
            host.close()

    def stock(self) -> Scored:
        args = (*ARGS, "--max-total-tokens=20000")
        env, host = _environment("stock"), self._host("stock")
        return Scored("stock", self._model, self._folder, args, env, "stock", host=host)

    def patched(self, **settings: str) -> SglangServer:
        settings = elastic_env(self._folder / "ledger", page_size=str(PAGE), **settings)
        env = _environment("patched", **settings)
        host = self._host("patched")
        return SglangServer("engine", self._model, self._folder, ARGS, env, host=host)


@pytest.fixture(scope="module")
def started(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(models.lfm, tmp_path_factory.mktemp("sglang-states"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def server(started: Started, references: list[Reference]) -> Iterator[SglangServer]:
    # After the stock one, since an idle engine keeps a core busy.
    server = started.patched(capacity="8MiB")
    try:
        server.start().wait_ready()
        yield server
        check_unhurt(server)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def references(started: Started) -> list[Reference]:
    """Of some prompts, of others that begin with these, and of requests that grow."""
    stock = started.stock()
    try:
        stock.start().wait_ready()
        return [ask(stock, *prompts) for prompts in ((PROMPTS, 16), (LONGER, 16), (GROWING, 48))]
    finally:
        stock.stop()


@pytest.fixture
def ledger(started: Started, server: SglangServer) -> Ledger:
    return Ledger(ledger_path(started._folder / "ledger"))


def _member(ledger: Ledger) -> MemberInfo:
    (info,) = [member for member in ledger.members() if member.name == NAME]
    return info


def _empty(ledger: Ledger) -> None:
    info = _member(ledger)
    ledger.trim(info.slot, info.generation, -1, cached=True)
    wait_until(lambda: _member(ledger).leased == FLOOR, 15, "empty but for its null blocks")


def test_tokens_are_those_of_stock_with_a_cache_and_without(
    server: SglangServer, references: list[Reference], ledger: Ledger
) -> None:
    mixed, longer, _ = references
    _empty(ledger)
    with LedgerWatch(Path(ledger.path)) as watch:
        mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
        hits = server.metrics().get("sglang:cached_tokens_total", 0)
        longer.check(burst(server, longer.prompts, longer.max_tokens))
        hits = server.metrics().get("sglang:cached_tokens_total", 0) - hits
        assert hits >= sum(map(len, PROMPTS)) // 2
    check_account(watch)
    # What every request left: its tokens, and at least the state at its end.
    tokens = sum(map(len, PROMPTS)) * LFM2.kv_bytes_per_token
    info = _member(ledger)
    assert tokens + len(PROMPTS) * LFM2.state_bytes <= info.cached <= info.leased
    _empty(ledger)


def test_requests_lose_their_states_to_a_limit_and_go_on(
    server: SglangServer, references: list[Reference], ledger: Ledger
) -> None:
    growing = references[-1]
    _empty(ledger)
    info = _member(ledger)
    states = len(GROWING) * SLOTS * LFM2.state_bytes
    tokens = sum(map(len, GROWING)) * LFM2.kv_bytes_per_token
    before = retracted(server)
    with LedgerWatch(Path(ledger.path)) as watch:
        running = Burst(server, growing.prompts, growing.max_tokens)
        wait_until(lambda: _member(ledger).leased > states + tokens, 120, "all run")
        limit = (states + tokens) // 2
        ledger.set_policy(info.slot, info.generation, limit=limit)
        wait_retracted(server, before)
        wait_until(lambda: _member(ledger).leased <= limit, 60, "within its limit")
        assert running.pending > len(GROWING) // 2, "the limit came too late to matter"
        ledger.set_policy(info.slot, info.generation, limit=-1)
        growing.check(running.wait())
    check_account(watch)
    _empty(ledger)


def test_no_more_requests_run_than_find_memory_for_their_states(
    server: SglangServer, references: list[Reference], ledger: Ledger
) -> None:
    growing = references[-1]
    _empty(ledger)
    info = _member(ledger)
    # For the states of two or three, with all their tokens.
    limit = FLOOR + 3 * (SLOTS * LFM2.state_bytes + 96 * LFM2.kv_bytes_per_token) + 4 * PAGE
    ledger.set_policy(info.slot, info.generation, limit=limit)
    try:
        with LedgerWatch(Path(ledger.path)) as watch:
            first = growing.part(0, 6, growing.max_tokens)
            first.check(burst(server, first.prompts, first.max_tokens))
        check_account(watch)
        assert watch.peak_committed(NAME) <= limit
    finally:
        ledger.set_policy(info.slot, info.generation, limit=-1)


def test_an_idle_engine_gives_cached_states_to_a_neighbour(
    server: SglangServer, references: list[Reference], ledger: Ledger
) -> None:
    mixed, longer, _ = references
    mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
    before = _member(ledger)
    assert before.cached > 0
    neighbour = ledger.join("neighbour")
    try:
        wanted = ledger.available() + before.cached // 2
        neighbour.set_demand(wanted, 1)
        neighbour.ask()
        wait_until(lambda: neighbour.claimable() >= wanted, 15, "it is given")
    finally:
        neighbour.leave()
    assert 0 < _member(ledger).cached < before.cached
    longer.check(burst(server, longer.prompts, longer.max_tokens))
