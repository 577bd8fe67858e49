# SPDX-License-Identifier: Apache-2.0
"""A server kept busy: so many requests in flight until somebody says stop."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from types import TracebackType

from .prompts import Prompt, equal_prompts
from .server import Answer, HttpServer, burst_async


class SteadyLoad:
    """Requests of one size to a server, each followed by another while the load lasts.

    Leaving the context waits for the requests in flight, so every request sent has an answer.
    """

    def __init__(
        self, server: HttpServer, in_flight: int, length: int, max_tokens: int, seed: int
    ) -> None:
        self.server = server
        self.max_tokens = max_tokens
        self.answers: list[Answer] = []
        self._in_flight = in_flight
        self._length = length
        self._seeds = itertools.count(seed * 1_000_000)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        await asyncio.gather(*(self._one_after_another() for _ in range(self._in_flight)))

    async def _one_after_another(self) -> None:
        while not self._stop.is_set():
            prompts = equal_prompts(1, self._length, next(self._seeds))
            self.answers += await burst_async(self.server, prompts, self.max_tokens)

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def stop(self) -> None:
        """No further requests; those in flight go on."""
        self._stop.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._thread.join(timeout=240)
        if error is None:
            assert not self._thread.is_alive(), f"{self.server.name} left requests unanswered"
            check_complete(self.answers, self.max_tokens)


class Burst:
    """Requests sent at once, in the background."""

    def __init__(self, server: HttpServer, prompts: Sequence[Prompt], max_tokens: int) -> None:
        self.server = server
        self.pending = len(prompts)
        self._max_tokens = max_tokens
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=self._run, args=(prompts,), daemon=True)
        self._thread.start()

    def _run(self, prompts: Sequence[Prompt]) -> None:
        self._answers = asyncio.run(
            burst_async(self.server, prompts, self._max_tokens, self._on_change)
        )

    def _on_change(self, change: int) -> None:
        if change < 0:
            self.pending += change

    def wait(self, timeout_s: float = 240.0) -> list[Answer]:
        """All answers, each of them complete."""
        self._thread.join(timeout=timeout_s)
        assert not self._thread.is_alive(), f"{self.server.name} left requests unanswered"
        check_complete(self._answers, self._max_tokens)
        return self._answers


def check_complete(answers: Sequence[Answer], max_tokens: int) -> None:
    assert answers
    for answer in answers:
        assert answer.status == 200, answer.error
        assert len(answer.tokens) == max_tokens
