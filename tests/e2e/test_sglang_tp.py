# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel SGLang ranks, each with a scheduler of its own, stay in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import Models
from tests.support.elastic import NAME, check_account, elastic_env, ledger_path
from tests.support.load import Burst
from tests.support.server import burst
from tests.support.sglang_fixtures import References, check_unhurt, retracted, wait_retracted
from tests.support.sglang_server import SglangHost, SglangServer
from tests.support.watch import LedgerWatch, page_memory, process_tree, wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
CAPACITY = 32 * MIB
PAGE = 64 << 10
"""Of one rank: a block of 16 tokens takes a quarter of it."""
ENVIRONMENT = {
    # Else SGLang wants a NUMA node for each rank.
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    # Else it starts NCCL wherever torch has it, on a CPU too.
    "SGLANG_NCCL_SO_PATH": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang-tp")


@pytest.fixture(scope="module")
def server(
    models: Models,
    sglang_references: Callable[[], References],  # are made meanwhile
    sglang_patched: SglangHost,
    folder: Path,
) -> Iterator[SglangServer]:
    env = elastic_env(folder / "ledger", capacity=str(CAPACITY), page_size=str(PAGE))
    # Small chunks, so that the ranks decide often.
    args = ("--tp-size=2", "--chunked-prefill-size=256")
    server = SglangServer("tp", models.llama, folder, args, env | ENVIRONMENT, host=sglang_patched)
    try:
        server.start().wait_ready()
        yield server
    finally:
        server.stop()


def test_the_stock_engines_tokens_under_moving_limits(
    server: SglangServer, sglang_references: Callable[[], References], folder: Path
) -> None:
    references = sglang_references()
    mixed = references.mixed.part(0, 16, 16)
    growing = references.growing.part(0, 8, 96)
    size = 2048 * len(growing.prompts) * len(growing.prompts[0])
    path = ledger_path(folder / "ledger")
    ledger = Ledger(path)
    (info,) = ledger.members()

    def leased() -> int:
        return ledger.members()[0].leased

    with LedgerWatch(path) as watch:
        for _ in range(2):
            mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
        ledger.trim(info.slot, info.generation, -1, cached=True)
        # The page of the padding block, on each rank.
        wait_until(lambda: leased() == 2 * PAGE, 15, "idle and empty")
        assert page_memory(process_tree(server.pid)) == 2 * PAGE

        before = retracted(server)
        running = Burst(server, growing.prompts, growing.max_tokens)
        wait_until(lambda: leased() >= size, 60, "all run")
        for part in (2, 3, 2):
            limit = size // part
            ledger.set_policy(info.slot, info.generation, limit=limit)
            wait_until(lambda limit=limit: leased() <= limit, 60, "within its limit")
            assert running.pending > 2, "the limit came too late to matter"
            ledger.set_policy(info.slot, info.generation, limit=-1)
            wait_until(
                lambda limit=limit: leased() > limit or not running.pending, 60, "used again"
            )
        growing.check(running.wait())
    wait_retracted(server, before + 2)
    check_account(watch)
    check_unhurt(server)


def test_a_killed_engines_bytes_return(server: SglangServer, folder: Path) -> None:
    ledger = Ledger(ledger_path(folder / "ledger"))
    burst(server, [[7] * 300], 4)
    (info,) = ledger.members()
    assert info.name == NAME and info.alive and info.leased > 2 * PAGE
    server.kill()
    heir = ledger.join("heir")
    try:
        # The kernel may take a moment to end all its processes.
        wait_until(lambda: heir.lease(CAPACITY), 10, "the dead engine holds nothing")
        assert {member.name for member in ledger.members()} == {"heir"}
    finally:
        heir.leave()
