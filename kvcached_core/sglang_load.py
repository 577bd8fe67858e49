# SPDX-License-Identifier: Apache-2.0
"""What SGLang's scheduler is about to run, in blocks of every pool."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .holding import Holding
from .lockstep import Load, Need

_CLIP_NEW_TOKENS = int(os.environ.get("SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION", "4096"))
"""As SGLang's own admission counts."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A pool of blocks of tokens."""

    block_tokens: int
    window: int | None = None
    """The last tokens of a request it keeps; None: all."""
    chunk: int | None = None
    """Tokens of a prefill at most; None for no bound."""

    @property
    def holding(self) -> Holding:
        most = most_tokens(self.window, self.chunk, self.block_tokens)
        return Holding(self.block_tokens, None if most is None else most // self.block_tokens)


@dataclass(frozen=True, slots=True)
class States:
    """A pool of slots for states, of which a request has some whatever its length."""

    per_request: int
    """Slots a request may hold at once."""
    held: int = 0
    """Slots in use now that are not merely cached."""

    @property
    def holding(self) -> Holding:
        return Holding(1, fixed_blocks=self.per_request)

    def need(self, running: int, new: int, waits: bool) -> Need:
        """Slots for all that each request may take, before any of it is let in: the engine takes
        some of them when it looks at a result, and must find them then.
        """
        now, soon = (max(0, self.per_request * n - self.held) for n in (running, running + new))
        wanted = max(soon, self.per_request * (running + 1) - self.held) if waits else soon
        return Need(now, soon, wanted, wanted)


PoolKind = Tokens | States


@dataclass(slots=True)
class _Tokens:
    """A request of SGLang's, in the words of demand.py."""

    num_tokens: int
    num_computed_tokens: int


class _Requests(Sequence[_Tokens]):
    """SGLang's requests, looked at only if somebody asks: mostly nobody does."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: Any) -> Any:
        request = self._requests[index]
        if isinstance(index, slice):
            return _Requests(request)
        if isinstance(request, _Tokens):
            return request
        return _Tokens(_length(request), getattr(request, "kv_committed_len", 0))

    def __iter__(self) -> Iterator[_Tokens]:
        return (self[index] for index in range(len(self._requests)))


def _length(request: Any) -> int:
    ids = getattr(request, "origin_input_ids", None)
    if ids is None:  # came in just now
        return len(getattr(request, "input_ids", None) or ())
    return len(ids) + len(request.output_ids)


def load_of(
    scheduler: Any,
    received: Sequence[Any],
    block_tokens: int,
    pools: Sequence[PoolKind] = (),
) -> Load | None:
    """What the engine's scheduler is about to run; None if it is idle.

    Args:
        scheduler: SGLang's.
        received: what came in for this pass and is not in its queue yet.
        block_tokens: tokens of one block.
        pools: what each is; (): one of all tokens.
    """
    chunked = scheduler.chunked_req
    running = list(scheduler.running_batch.reqs)
    last = scheduler.last_batch
    if last is not None and last is not scheduler.running_batch and last.forward_mode.is_extend():
        running += [request for request in last.reqs if request is not chunked]
    queued = scheduler.waiting_queue
    new = [request for request in received if getattr(request, "input_ids", None)]
    if not running and not queued and not new and chunked is None and last is None:
        return None
    holders = running
    if chunked is not None:
        # Nobody can have what it holds, so what it lacks stays for it. The last to be preempted.
        rest = _Tokens(_length(chunked) + block_tokens, chunked.kv_committed_len)
        holders = [rest, *running]
    waiting = [*queued, *new]
    kinds = pools or (Tokens(block_tokens),)
    needs = _needs(scheduler, running, waiting, block_tokens, kinds)
    first = None
    if len(waiting) > 1:
        first = partial(_needs, scheduler, running, waiting[:1], block_tokens, kinds)
    return Load(_Requests(holders), _Requests(waiting), needs, first)


def _needs(
    scheduler: Any,
    running: Sequence[Any],
    waiting: Sequence[Any],
    block_tokens: int,
    pools: Sequence[PoolKind],
) -> tuple[Need, ...]:
    """What it takes of every pool, with these requests besides the one that is between chunks."""
    chunked = scheduler.chunked_req
    decode = sum(request.kv_committed_len % block_tokens == 0 for request in running)
    # As many tokens as one prefill may have, and the page each of its requests may leave unfilled.
    # Where there are chunks, only their size cuts one: it must fit, or its request is not let in.
    room = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
    prefill = chunk = admitted = 0
    if chunked is not None:
        left = min(room, max(0, _length(chunked) - chunked.kv_committed_len))
        prefill = chunk = -(-left // block_tokens) + 1
        room -= left
    most = getattr(scheduler, "max_running_requests", None) or len(running) + len(waiting)
    for request in waiting:
        if room <= 0:
            break
        admitted += len(running) + admitted < most
        tokens = min(_length(request), room)
        if scheduler.chunked_prefill_size is None and not prefill:
            tokens = _length(request)  # the first is admitted whatever its length
        prefill += -(-tokens // block_tokens) + 1
        room -= tokens
    now = Need(decode + chunk, decode + prefill, decode + prefill)
    if waiting:
        # The engine admits the first once all it may generate could be had, and what those that
        # run may still generate, in part.
        ratio = scheduler.new_token_ratio_tracker.current
        to_come = _to_come(waiting[0]) + sum(_to_come(request, ratio) for request in running)
    needs = []
    for pool in pools:
        need = now
        if isinstance(pool, States):
            need = pool.need(len(running) + (chunked is not None), admitted, bool(waiting))
        elif waiting:
            tokens = prompt = _length(waiting[0])
            if pool.window is None:
                tokens += int(to_come)
            else:
                # A chunk or the window, whichever is more, and the window behind the next chunk.
                size = max(scheduler.chunked_prefill_size or prompt, pool.window)
                tokens, prompt = (
                    max(min(prompt, size), pool.window),
                    min(prompt, size + pool.window),
                )
            wanted = max(now.wanted_blocks, math.ceil((tokens + 2 * block_tokens) / block_tokens))
            first = decode + chunk + -(-prompt // block_tokens) + 1
            need = Need(now.running_blocks, now.needed_blocks, wanted, first)
        needs.append(need)
    return tuple(needs)


def most_tokens(window: int | None, chunk: int | None, block_tokens: int) -> int | None:
    """Tokens of a pool that one request ever holds; None for no bound.

    Args:
        window: the last tokens of a request the pool keeps; None: all.
        chunk: tokens of a prefill at most; None for no bound.
        block_tokens: tokens of one block.
    """
    if window is None or chunk is None:
        return None
    # One chunk is computed while the next is scheduled, and the window lies before both.
    blocks = -(-(window + 2 * chunk) // block_tokens) + 2
    return blocks * block_tokens


def pool_tokens(
    num_bytes: int,
    block_tokens: int,
    full_bytes: int,
    window_bytes: int,
    window: int,
    chunk: int | None,
) -> tuple[int, int]:
    """Virtual tokens of a pool of all tokens and of one of windows that share so much memory.

    Either may have all that the other leaves, but a request that fills the first must find room
    for its window.

    Args:
        num_bytes: for both.
        block_tokens: tokens of one block, which the results are multiples of.
        full_bytes: of a token in the first pool.
        window_bytes: of a token in the second.
        window: the last tokens of a request that the second keeps.
        chunk: tokens of a prefill at most; None or less than 1 for no bound.
    """
    beside = most_tokens(window, chunk if chunk and chunk > 0 else None, block_tokens)
    tokens = num_bytes // (full_bytes + window_bytes)
    if beside is not None:
        tokens = max(tokens, (num_bytes - beside * window_bytes) // full_bytes)
    windows = min(tokens, num_bytes // window_bytes)
    return tokens // block_tokens * block_tokens, windows // block_tokens * block_tokens


def _to_come(request: Any, ratio: float = 1.0) -> float:
    """Tokens a request may still generate; in part, if it may stop before."""
    sampling = request.sampling_params
    most = (sampling.max_new_tokens or 0) - len(getattr(request, "output_ids", ()))
    if sampling.ignore_eos:
        return max(0, most)
    return max(0, min(most, _CLIP_NEW_TOKENS)) * ratio
