# SPDX-License-Identifier: Apache-2.0
"""What is committed ahead: passes that grow find their memory mapped, and others map none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcached_core import Ledger, StepOps
from tests.support.block_pool import PAGE, Block, Engine

BLOCK_TOKENS = 16
AHEAD = 4


@dataclass
class Request:
    num_tokens: int
    num_computed_tokens: int = 0


class Server:
    """An engine whose passes are written down; a page has two blocks."""

    def __init__(self, ledger: Ledger, ahead: int = AHEAD) -> None:
        self.engine = Engine(
            ledger, 2000, PAGE // 2, ahead_bytes=ahead * PAGE // 2, parked_bytes=AHEAD * PAGE // 2
        )
        self.running: list[Request] = []
        self.waiting: list[Request] = []

    def step(
        self, blocks: int, free: list[Block] | None = None, beside: int = 0
    ) -> tuple[StepOps, list[Block]]:
        """A pass that takes so many blocks after those of the last step's result came back."""
        if free:
            self.engine.free(free)
        self.engine.scheduler.begin_pass(self.running, self.waiting)
        taken = self.engine.take(blocks, beside)
        assert taken is not None
        return self.engine.scheduler.take_ops(), taken


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield Server(Ledger(str(tmp_path / "host-0.ledger"), 1000 * PAGE))


def blocks_of(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def prefill(server: Server, prompts: int, tokens: int) -> list[StepOps]:
    """One prompt a pass, as an engine's scheduler sees them."""
    server.waiting += [Request(tokens) for _ in range(prompts)]
    found = []
    for _ in range(prompts):
        server.engine.scheduler.begin_pass(server.running, server.waiting)
        request = server.waiting.pop(0)
        server.running.append(request)
        assert server.engine.take(tokens // BLOCK_TOKENS) is not None
        found.append(server.engine.scheduler.take_ops(tokens))
        request.num_computed_tokens = tokens
    return found


def test_slow_growth_never_waits_for_memory_again(server: Server) -> None:
    first, taken = server.step(1)
    assert blocks_of(first.commit) > 0
    later = []
    for _ in range(200):
        ops, taken = server.step(1, beside=taken[-1].block_id)
        later.append(ops)
    assert [ops.commit for ops in later] == [[]] * 200
    ahead = [blocks_of(ops.commit_ahead) for ops in later]
    assert 196 <= sum(ahead) <= 204
    assert sum(map(bool, ahead)) <= 100  # more than one block at a time


def test_prompts_that_wait_are_backed_while_the_one_before_is_computed(server: Server) -> None:
    passes = prefill(server, 10, 64 * BLOCK_TOKENS)
    assert blocks_of(passes[0].commit) >= 64
    assert [ops.commit for ops in passes[1:]] == [[]] * 9
    # At the end nobody waits, and what runs takes one block each for its answer.
    assert server.engine.scheduler.allocator.num_clean <= len(server.running) + 1


def test_a_prompt_in_chunks_is_backed_chunk_by_chunk(server: Server) -> None:
    request = Request(20 * 32 * BLOCK_TOKENS)
    server.running.append(request)
    commits = []
    for _ in range(20):
        ops, _ = server.step(32)
        commits.append(blocks_of(ops.commit))
        request.num_computed_tokens += 32 * BLOCK_TOKENS
    assert commits[0] >= 32 and commits[1:] == [0] * 19
    assert server.engine.scheduler.allocator.num_clean <= 64


def test_nothing_is_mapped_where_nothing_grows(server: Server) -> None:
    held = [server.step(20)[1] for _ in range(8)]
    commits = 0
    for turn in range(100):
        ops, taken = server.step(20, held[turn % 8])
        held[turn % 8] = taken
        commits += blocks_of(ops.commit) + blocks_of(ops.commit_ahead) + blocks_of(ops.decommit)
    assert commits == 0


def test_without_anything_ahead_each_pass_maps_its_own(tmp_path: Path) -> None:
    server = Server(Ledger(str(tmp_path / "host-0.ledger"), 1000 * PAGE), ahead=0)
    for ops in prefill(server, 5, 10 * BLOCK_TOKENS):
        assert blocks_of(ops.commit) in (10, 11)
        assert ops.commit_ahead == []


def test_a_large_forecast_that_cannot_be_had_leaves_the_small_one(tmp_path: Path) -> None:
    server = Server(Ledger(str(tmp_path / "host-0.ledger"), 110 * PAGE))
    passes = prefill(server, 2, 64 * BLOCK_TOKENS)
    # 43 pages are left: 64 blocks would be most of them.
    assert blocks_of(passes[0].commit_ahead) == 0 or blocks_of(passes[0].commit_ahead) <= AHEAD + 1
