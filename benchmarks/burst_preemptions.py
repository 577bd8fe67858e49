# SPDX-License-Identifier: Apache-2.0
"""How often engines preempt while their bursts do not fit into memory together, in simulated time.

    python benchmarks/burst_preemptions.py --patterns burst:2 burst:3 burst:4

For comparing rules of admission: it takes seconds, needs no GPU, and the same rules give the same
numbers. Every engine has the real scheduler half, allocator and ledger; what is left of vLLM's
scheduler is the order in which it takes blocks, lets in and preempts. A step takes a fixed time and
more for each prompt token, shared with the other engines that compute prompts. The defaults are
four 8B models on an H200 cut to 80 GB (`latency_benefit.py`, density). With `--static` each engine
has so many pages of its own. Times are the model's, not a machine's: read preemptions and prompt
tokens, and trust times no further than a GPU confirmed them (benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import kvcached_core.demand
import kvcached_core.rivals
import kvcached_core.scheduler
from benchmarks.serving.patterns import Arrival, Lengths, Pattern, parse
from kvcached_core import Ledger
from tests.support.block_pool import PAGE, Block, Engine

BLOCK_TOKENS = 16
TIMED = (kvcached_core.demand, kvcached_core.rivals, kvcached_core.scheduler)
STARVED_S = 0.002
"""An engine that could run nothing looks again so much later."""
IDLE_S = 0.05
START_S = 1000.0


@dataclass(eq=False)
class Request:
    at: float
    prompt: int
    answer: int
    max_tokens: int
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    held: list[Block] = field(default_factory=list)
    first: float = 0.0
    end: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.num_output_tokens


class Simulated:
    """One engine: vLLM's `Scheduler.schedule`, as far as it decides about memory."""

    def __init__(self, name: str, ledger: Ledger, arrivals: list[Arrival], a: Any) -> None:
        self._engine = Engine(
            ledger,
            a.virtual_blocks,
            PAGE // a.page_blocks,
            name=name,
            parked_bytes=3 * PAGE,
            ahead_bytes=PAGE,
        )
        self._budget, self._seqs = a.batched_tokens, a.seqs
        self.coming = [
            Request(r.at, r.prompt, r.output, a.max_tokens or r.output) for r in arrivals
        ]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.done: list[Request] = []
        self.preemptions = self.prompt_tokens = 0
        self._scheduled: list[tuple[Request, int]] = []

    @property
    def is_done(self) -> bool:
        return not (self.coming or self.waiting or self.running)

    def schedule(self, now: float) -> int | None:
        """A pass; the prompt tokens of its step, or None if there is none."""
        while self.coming and self.coming[0].at <= now:
            self.waiting.append(self.coming.pop(0))
        self._scheduled = []
        before, budget = self.preemptions, self._budget
        for _ in range(self._engine.scheduler.begin_pass(self.running, self.waiting)):
            self._preempt()
        for request in list(self.running):
            tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            while request in self.running and tokens and not self._take(request, tokens, True):
                self._preempt()
            if request in self.running and tokens:
                self._scheduled.append((request, tokens))
                budget -= tokens
        while self.waiting and self.preemptions == before and budget:
            request = self.waiting[0]
            tokens = min(request.num_tokens, budget)
            whole = -(-request.num_tokens // BLOCK_TOKENS)
            if len(self.running) == self._seqs or self._engine.queue.lacks(whole):
                break
            if not self._take(request, tokens, False):
                break
            self.running.append(self.waiting.pop(0))
            self._scheduled.append((request, tokens))
            budget -= tokens
        self._engine.scheduler.take_ops(self._budget - budget)
        pages = self._engine.scheduler.allocator.committed_pages(0)
        for account in self._engine.accounts:
            account.member.release(account.member.info().leased - pages * PAGE)
        prompt_tokens = sum(tokens for _, tokens in self._scheduled if tokens > 1)
        self.prompt_tokens += prompt_tokens
        return prompt_tokens if self._scheduled else None

    def finish(self, now: float) -> None:
        """The step is over."""
        for request, tokens in self._scheduled:
            request.num_computed_tokens += tokens
            if request.num_computed_tokens < request.num_tokens:
                continue
            request.num_output_tokens += 1
            request.first = request.first or now
            if request.num_output_tokens == request.answer:
                request.end = now
                self._engine.free(request.held)
                self.running.remove(request)
                self.done.append(request)

    def close(self) -> None:
        self._engine.scheduler.close()

    def _take(self, request: Request, tokens: int, running: bool) -> bool:
        queue = self._engine.queue
        wanted = -(-(request.num_computed_tokens + tokens) // BLOCK_TOKENS) - len(request.held)
        if wanted > 0:
            if queue.lacks(wanted, running) or not queue.ensure(wanted, (), running):
                return False
            taken = queue.popleft_n(wanted, request.held[-1].block_id if request.held else 0)
            for block in taken:
                block.ref_cnt = 1
            request.held += taken
        return True

    def _preempt(self) -> None:
        request = self.running.pop()
        self._scheduled = [(other, n) for other, n in self._scheduled if other is not request]
        self._engine.free(request.held)
        request.held, request.num_computed_tokens = [], 0
        self.waiting.insert(0, request)
        self.preemptions += 1


@contextmanager
def simulated_time() -> Iterator[SimpleNamespace]:
    """A clock with `now`, for the scheduler half as well."""
    clock = SimpleNamespace(now=START_S)
    with ExitStack() as stack:
        for module in TIMED:
            time = SimpleNamespace(monotonic=lambda: clock.now)
            stack.enter_context(patch.object(module, "time", time))
        stack.enter_context(patch.object(kvcached_core.scheduler, "_STARVED_PAUSE_MS", 0))
        yield clock


def simulate(pattern: Pattern, a: Any, folder: Path, clock: SimpleNamespace) -> dict[str, Any]:
    """Play the pattern until all is answered."""
    pages = a.static or a.pages
    engines = [
        Simulated(
            f"engine{index}",
            Ledger(str(folder / f"{index if a.static else 'all'}.ledger"), pages * PAGE, 0),
            arrivals,
            a,
        )
        for index, arrivals in enumerate(pattern.models)
    ]
    prompts: dict[int, int] = {}  # of the steps at work
    due = [(START_S, index) for index in range(len(engines))]
    while not all(engine.is_done for engine in engines):
        clock.now, index = heapq.heappop(due)
        engine, now = engines[index], clock.now - START_S
        engine.finish(now)
        tokens = engine.schedule(now)
        if tokens is None:
            prompts.pop(index, None)
            step = STARVED_S if engine.waiting else IDLE_S
            if not engine.waiting and engine.coming:
                step = min(step, max(STARVED_S, engine.coming[0].at - now))
        else:
            prompts[index] = tokens
            sharers = sum(map(bool, prompts.values())) if tokens else 0
            weights = a.weights_ms / 1e3 * len(prompts)
            step = max(a.step_ms / 1e3, weights) + a.token_us / 1e6 * tokens * sharers
        heapq.heappush(due, (clock.now + step, index))
    done = [request for engine in engines for request in engine.done]
    for engine in engines:
        engine.close()
    first = sorted(request.first - request.at for request in done)
    return {
        "pattern": pattern.name,
        "static_pages": a.static,
        "requests": len(done),
        "preemptions": sum(engine.preemptions for engine in engines),
        "prompt_tokens": sum(request.prompt for request in done),
        "computed_prompt_tokens": sum(engine.prompt_tokens for engine in engines),
        "ttft_mean_ms": round(1e3 * sum(first) / len(first)),
        "ttft_p99_ms": round(1e3 * first[int(0.99 * len(first))]),
        "request_mean_s": round(sum(r.end - r.at for r in done) / len(done), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["burst:2", "burst:3", "burst:4"])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=3000, help="tokens")
    parser.add_argument("--output", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--max-tokens", type=int, default=0, help="of an answer; 0: as it gets")
    parser.add_argument("--pages", type=int, default=262, help="that the engines share")
    parser.add_argument("--static", type=int, default=0, help="pages of each engine instead")
    parser.add_argument("--page-blocks", type=int, default=8, help="blocks on a page")
    parser.add_argument("--virtual-blocks", type=int, default=8000, help="of each engine")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="of a step, at most")
    parser.add_argument("--seqs", type=int, default=128, help="of a step, at most")
    parser.add_argument("--step-ms", type=float, default=7.5, help="of a decode step")
    parser.add_argument("--weights-ms", type=float, default=3.7, help="to read the weights once")
    parser.add_argument("--token-us", type=float, default=40, help="of a prompt's token")
    parser.add_argument("--out", type=Path, help="a file for the results")
    a = parser.parse_args(argv)
    cells = []
    for name in a.patterns:
        pattern = parse(name, a.models, Lengths(a.prompt, a.output))
        folder = tempfile.TemporaryDirectory(prefix="kvcached-bench-")
        with folder as path, simulated_time() as clock:
            cells.append(simulate(pattern, a, Path(path), clock))
        print(json.dumps(cells[-1]), flush=True)
    if a.out:
        a.out.write_text(json.dumps(cells, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
