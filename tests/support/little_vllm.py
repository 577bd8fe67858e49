# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler reduced to its memory decisions, over the real scheduler half and ledger."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvcached_core import Ledger

from .block_pool import PAGE, Block, Engine

TOKENS = 16
"""Of a block."""
PASS_S = 0.01
CHUNK = 6
MOST = 6000
"""Passes; more are taken for standing still."""


@dataclass(eq=False)
class Prompt:
    """A request that computes its prompt in chunks and then generates a token in each step."""

    blocks: int
    steps: int
    grows: bool = False
    """Whether what it generates takes blocks, too."""
    num_output_tokens: int = 0
    held: list[Block] = field(default_factory=list)

    @property
    def max_tokens(self) -> int:
        return self.steps

    @property
    def num_tokens(self) -> int:
        return self.blocks * TOKENS + self.num_output_tokens * self.grows

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // TOKENS)

    @property
    def num_computed_tokens(self) -> int:
        return len(self.held) * TOKENS


class LittleScheduler:
    """Lets prompts in, grows and preempts them in the order vLLM does.

    Args:
        ledger: which it joins, pages of one block each.
        name: of the member.
        prompts: what it is to serve, in this order.
        chunk: blocks a pass computes.
        cached: whether what ends or is preempted stays in a prefix cache; nothing ever hits it.
        whole: whether a prompt is let in only where all of it could be had, as is the default.
    """

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        prompts: Sequence[Prompt],
        chunk: int,
        *,
        cached: bool,
        whole: bool,
        **policy: Any,
    ) -> None:
        self.engine = Engine(ledger, 1000, PAGE, name=name, **policy)
        self.waiting = list(prompts)
        self.running: list[Prompt] = []
        self.preemptions = 0
        self._chunk = chunk
        self._cached = cached
        self._whole = whole
        self._tokens = 0

    def begin(self) -> None:
        for _ in range(self.engine.scheduler.begin_pass(self.running, self.waiting)):
            self._preempt()

    def schedule(self) -> None:
        """As the engine's: what runs first, the last to come giving way to those before it."""
        before = self.preemptions
        self._tokens = 0
        for prompt in list(self.running):
            while prompt in self.running and not self._run(prompt):
                self._preempt()
        while self.waiting and self.preemptions == before:
            prompt = self.waiting[0]
            if self._whole and self.engine.queue.lacks(prompt.num_blocks):
                return
            self.running.append(prompt)
            if not self._take(prompt, running=False):
                self.running.pop()
                return
            self.waiting.pop(0)

    def end(self) -> None:
        self.engine.scheduler.take_ops(self._tokens)
        pages = self.engine.scheduler.allocator.committed_pages(0)
        for account in self.engine.accounts:
            account.member.release(account.member.info().leased - pages * PAGE)

    @property
    def is_done(self) -> bool:
        return not self.waiting and not self.running

    def _run(self, prompt: Prompt) -> bool:
        if len(prompt.held) < prompt.num_blocks:
            return self._take(prompt, running=True)
        self._tokens += 1
        prompt.num_output_tokens += 1
        if prompt.num_output_tokens == prompt.steps:
            self.running.remove(prompt)
            self._let_go(prompt)
        return True

    def _take(self, prompt: Prompt, *, running: bool) -> bool:
        queue = self.engine.queue
        wanted = min(self._chunk, prompt.num_blocks - len(prompt.held))
        if queue.lacks(wanted, running) or not queue.ensure(wanted, (), running):
            return False
        taken = self.engine.take(wanted)
        assert taken is not None
        prompt.held += taken
        self._tokens += wanted * TOKENS
        return True

    def _preempt(self) -> None:
        prompt = self.running.pop()
        self._let_go(prompt)
        self.waiting.insert(0, prompt)
        self.preemptions += 1

    def _let_go(self, prompt: Prompt) -> None:
        self.engine.free(prompt.held, cached=self._cached)
        prompt.held = []


class World:
    """Engines of one ledger, whose passes take 10 ms each, in any order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = folder / "host-0.ledger"
        self.now = 100.0
        for module in ("scheduler", "demand", "rivals"):
            monkeypatch.setattr(f"kvcached_core.{module}.time.monotonic", lambda: self.now)
        monkeypatch.setattr("kvcached_core.scheduler._STARVED_PAUSE_MS", 0)

    def engines(
        self, pages: int, prompts: list[list[Prompt]], **kind: bool
    ) -> list[LittleScheduler]:
        return [
            LittleScheduler(
                Ledger(str(self._path), pages * PAGE, 0),
                f"e{index}",
                own,
                CHUNK,
                parked_bytes=2 * PAGE,
                **kind,
            )
            for index, own in enumerate(prompts)
        ]

    def serve(self, engines: list[LittleScheduler], shuffled: random.Random) -> int:
        """Until all is served; the passes it took."""
        for step in range(MOST):
            order = shuffled.sample(engines, len(engines))
            for engine in order:
                engine.begin()
            for engine in order:
                engine.schedule()
            for engine in order:
                engine.end()
            self.now += PASS_S
            if all(engine.is_done for engine in engines):
                return step
        left = [(len(engine.waiting), len(engine.running)) for engine in engines]
        pytest.fail(f"after {MOST} passes these still wait and run: {left}")
