# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler reduced to its memory decisions, over the real scheduler half and ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcached_core import Ledger

from .block_pool import PAGE, Block, Engine

TOKENS = 16
"""Of a block."""


@dataclass(eq=False)
class Prompt:
    """A request that computes its prompt in chunks and then runs on for some steps."""

    blocks: int
    steps: int
    held: list[Block] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.blocks * TOKENS

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
            if self._whole and self.engine.queue.lacks(prompt.blocks):
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
        if len(prompt.held) < prompt.blocks:
            return self._take(prompt, running=True)
        self._tokens += 1
        prompt.steps -= 1
        if not prompt.steps:
            self.running.remove(prompt)
            self._let_go(prompt)
        return True

    def _take(self, prompt: Prompt, *, running: bool) -> bool:
        queue = self.engine.queue
        wanted = min(self._chunk, prompt.blocks - len(prompt.held))
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
