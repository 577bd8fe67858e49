# SPDX-License-Identifier: Apache-2.0
"""Requests on pages of their own: what is left when most have ended, and what it costs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.support.block_pool import PAGE, Block, Engine

ON_A_PAGE = 8
BLOCK_TOKENS = 16


@dataclass
class Request:
    end: int
    tokens: int = 256
    blocks: list[Block] = field(default_factory=list)


class Decoding:
    """Requests that take a block every 16 steps, each until it ends."""

    def __init__(self, ledger: Ledger, parked: int = 4) -> None:
        self.engine = Engine(
            ledger, 20000, PAGE // ON_A_PAGE, parked_bytes=parked * PAGE, decay_s=0.0
        )
        self.running: list[Request] = []

    def admit(self, end: int) -> bool:
        request = Request(end)
        taken = self.engine.take(request.tokens // BLOCK_TOKENS)
        if taken is None:
            return False
        request.blocks = taken
        self.running.append(request)
        return True

    def step(self, admitted: int = 0, ends: int = 0) -> int:
        """One token for all, and requests that are let in; how many were."""
        self.engine.scheduler.begin_pass()
        count = sum(self.admit(ends) for _ in range(admitted))
        for request in list(self.running):
            request.tokens += 1
            if request.tokens > len(request.blocks) * BLOCK_TOKENS:
                taken = self.engine.take(1, request.blocks[-1].block_id)
                if taken is None:
                    continue
                request.blocks += taken
            if request.tokens >= request.end:
                self.running.remove(request)
                self.engine.free(request.blocks[::-1])
        self.engine.finish()
        return count

    @property
    def blocks(self) -> int:
        return 1 + sum(len(request.blocks) for request in self.running)

    @property
    def pages(self) -> int:
        return self.engine.scheduler.allocator.committed_pages(0)

    @property
    def floor(self) -> int:
        """Pages that the blocks would fill without a gap."""
        return -(-self.blocks // ON_A_PAGE)


def load(decoding: Decoding, requests: int = 256) -> tuple[int, int]:
    """Many short answers and some long ones; pages at the peak, and their packed floor."""
    rng = random.Random(0)
    peak = floor = 0
    for i in range(requests):
        end = 256 + (3072 if i % 16 == 0 else rng.randrange(16, 512))
        decoding.engine.scheduler.begin_pass()
        assert decoding.admit(end)
        if i % 3 == 0:
            decoding.step()
    while any(request.end <= 768 for request in decoding.running):
        decoding.step()
        if decoding.floor >= floor:
            peak, floor = decoding.pages, decoding.floor
    for _ in range(200):
        decoding.step()
    return peak, floor


def test_what_long_answers_keep_is_little_more_than_they_need(tmp_path: Path) -> None:
    decoding = Decoding(Ledger(str(tmp_path / "host-0.ledger"), 4000 * PAGE))
    peak, floor = load(decoding)
    assert len(decoding.running) == 16
    assert decoding.pages <= 1.1 * decoding.floor
    assert peak <= 1.2 * floor


def test_without_it_many_times_as_much_is_kept(tmp_path: Path) -> None:
    decoding = Decoding(Ledger(str(tmp_path / "host-0.ledger"), 4000 * PAGE))
    decoding.engine.scheduler._may_keep_apart = False
    peak, floor = load(decoding)
    assert decoding.pages >= 2 * decoding.floor  # what the test above would find
    assert peak <= 1.02 * floor


def test_no_request_waits_for_room_that_is_there(tmp_path: Path) -> None:
    capacity = 200
    decoding = Decoding(Ledger(str(tmp_path / "host-0.ledger"), capacity * PAGE), parked=0)
    while decoding.step(admitted=1, ends=10**6):
        pass
    assert decoding.pages == capacity
    # All that is left is less than the next prompt.
    free = capacity * ON_A_PAGE - decoding.blocks
    assert free < 256 // BLOCK_TOKENS


def test_pages_are_shared_while_a_neighbour_waits(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "host-0.ledger"), 400 * PAGE)
    decoding = Decoding(ledger)
    decoding.step(admitted=10, ends=10**6)
    assert decoding.engine.scheduler.apart
    neighbour = Engine(Ledger(ledger.path, ledger.capacity, ledger.headroom), 20000, PAGE // 8)
    assert neighbour.take(8 * 500) is None
    decoding.step()
    assert not decoding.engine.scheduler.apart


@pytest.mark.parametrize("block_bytes", [PAGE, 3 * PAGE])
def test_a_page_that_holds_one_block_is_nobodys_neighbour(tmp_path: Path, block_bytes: int) -> None:
    engine = Engine(Ledger(str(tmp_path / "host-0.ledger"), 400 * PAGE), 100, block_bytes)
    engine.scheduler.begin_pass()
    assert not engine.scheduler.apart
