# SPDX-License-Identifier: Apache-2.0
"""The router's pure policies: deadlines, choice of a replica, beginnings of prompts."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.router import gate as gate_module
from kvcached_core.router.balance import BOUND, least_loaded, prefix_affine
from kvcached_core.router.deadlines import next_job, schedule
from kvcached_core.router.errors import ApiError
from kvcached_core.router.gate import Gate, Ticket
from kvcached_core.router.prompt import parse
from kvcached_core.router.settings import GpuSettings


@dataclass(frozen=True)
class Job:
    arrived: float
    due: float
    work: float


@dataclass
class Choice:
    name: str
    load: int = 0


def late(order: tuple[Job, ...], now: float) -> int:
    missed = 0
    for job in order:
        now += job.work
        missed += now > job.due
    return missed


jobs = st.lists(
    st.builds(Job, st.integers(0, 5), st.integers(0, 30), st.integers(0, 12)), max_size=7
)


@given(jobs, st.integers(0, 5))
def test_no_order_misses_fewer_deadlines(found: list[Job], now: int) -> None:
    in_time, missed = schedule(found, now)
    best = min(late(order, now) for order in itertools.permutations(found))
    assert sorted(map(id, in_time + missed)) == sorted(map(id, found))
    assert late(tuple(in_time), now) == 0
    assert len(missed) == best


def test_slack_gives_up_the_long_job_and_fifo_does_not() -> None:
    long = Job(arrived=0, due=11, work=10)
    short = [Job(arrived=1, due=12, work=1), Job(arrived=2, due=12.5, work=1)]
    assert next_job([long, *short], 0, "fifo") is long
    in_time, missed = schedule([long, *short], 0)
    assert (in_time, missed) == ([long, *short], [])
    in_time, missed = schedule([long, *short], 2)
    assert (in_time, missed) == (short, [long])
    assert next_job([long, *short], 2, "slack") is short[0]
    assert next_job([], 0, "slack") is None
    assert next_job([], 0, "fifo") is None


def test_what_must_be_late_goes_last_and_in_turn() -> None:
    lost = [Job(arrived=3, due=1, work=1), Job(arrived=2, due=1.5, work=1)]
    soon = Job(arrived=9, due=20, work=1)
    assert next_job([*lost, soon], 10, "slack") is soon
    assert next_job(lost, 10, "slack") is lost[1]


def test_least_loaded_takes_equals_in_turn() -> None:
    choices = [Choice("a", 2), Choice("b", 1), Choice("c", 1)]
    assert [least_loaded(choices, turn).name for turn in range(4)] == ["b", "c", "b", "c"]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.binary(max_size=40))
def test_prefix_choice_is_bounded(loads: list[int], prefix: bytes) -> None:
    choices = [Choice(f"r{i}", load) for i, load in enumerate(loads)]
    chosen = prefix_affine(choices, prefix)
    assert chosen.load + 1 <= math.ceil(BOUND * (sum(loads) + 1) / len(loads))


def test_a_prefix_stays_where_it_was() -> None:
    choices = [Choice(f"r{i}") for i in range(4)]
    prefixes = [f"system prompt {i}".encode() for i in range(200)]
    before = {prefix: prefix_affine(choices, prefix).name for prefix in prefixes}
    counts = [list(before.values()).count(choice.name) for choice in choices]
    assert min(counts) > 25, "all replicas get some"
    # One goes: only what it had moves.
    after = {prefix: prefix_affine(choices[:3], prefix).name for prefix in prefixes}
    assert all(after[p] == before[p] for p in prefixes if before[p] != "r3")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"model":"m","prompt":"aaaaaaaaaaaaaaaaaaaaX"}',
         '{"model":"m","prompt":"aaaaaaaaaaaaaaaaaaaaY"}', True),
        ('{"model":"m","prompt":"aX"}', '{"model":"m","prompt":"aY"}', False),
        ('{"model":"m","prompt":[1,2,3,4,5,6,7,8,9,0,1]}',
         '{"model":"m","prompt":[1,2,3,4,5,6,7,8,9,0,2]}', True),
        ('{"model":"m","prompt":[1,23]}', '{"model":"m","prompt":[12,3]}', False),
        ('{"model":"m","messages":[{"role":"system","content":"be good"},{"content":"X"}]}',
         '{"model":"m","messages":[{"role":"system","content":"be good"},{"content":"Y"}]}', True),
        ('{"model":"m","messages":[{"role":"user","content":"X"}]}',
         '{"model":"m","messages":[{"role":"user","content":"Y"}]}', False),
    ],
)  # fmt: skip
def test_prompts_that_begin_alike(one: str, other: str, same: bool) -> None:
    found = [parse(text.encode()).prefix(20) for text in (one, other)]
    assert (found[0] == found[1]) is same


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"model":"m","prompt":"12345678"}', 3),
        (b'{"model":"m","prompt":[5,6,7]}', 3),
        (b'{"model":"m","prompt":[[5,6],[7]]}', 3),
        (b'{"model":"m","messages":[{"role":"user","content":"12345678"}]}', 3),
        (b'{"model":"m","messages":[{"content":[{"type":"text","text":"1234"},'
         b'{"type":"image_url","image_url":{"url":"data:xxxxxxxxxxxxxxx"}}]}]}', 2),
        (b'{"model":"m"}', 0),
    ],
)  # fmt: skip
def test_length_of_a_prompt(body: bytes, tokens: int) -> None:
    assert parse(body).tokens == tokens


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff", b'{"model":1}', b'{"model":""}', b"{}", b"[" * 100_000,
     b'{"model":"m","prompt":' + b"[" * 900 + b"]" * 900 + b"}"],
)  # fmt: skip
def test_bodies_that_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400


words = st.sampled_from(["", "m", "text", "content", "\u00e4", "\ud800"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["model", "prompt", "messages", "input"]), anything))
def test_any_body_is_read_or_refused(data: dict[str, object]) -> None:
    try:
        prompt = parse(json.dumps(data).encode())
    except ApiError as error:
        assert error.status == 400
    else:
        assert prompt.tokens >= 0
        assert len(prompt.prefix(64)) <= 64


# -- the queue ------------------------------------------------------------------------------------


def ticket(due: float, work: float = 0.0, arrived: float = 0.0) -> Ticket:
    return Ticket(arrived, due, work)


def run_gate(order: str) -> list[str]:
    done: list[str] = []

    async def main() -> None:
        gate = Gate("g", GpuSettings(max_running=1, order=order))  # type: ignore[arg-type]
        await gate.enter(ticket(0))

        async def one(name: str, entry: Ticket) -> None:
            async with gate.turn(entry):
                done.append(name)

        far = 1e12
        tasks = [
            asyncio.create_task(one("later", ticket(far + 9, arrived=1))),
            asyncio.create_task(one("soon", ticket(far + 1, arrived=2))),
        ]
        await asyncio.sleep(0)
        assert gate.waiting == 2
        gate.leave()
        await asyncio.gather(*tasks)
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(main())
    return done


def test_the_order_of_a_queue_can_be_chosen() -> None:
    assert run_gate("slack") == ["soon", "later"]
    assert run_gate("fifo") == ["later", "soon"]


@pytest.mark.parametrize(
    ("objectives", "order"),
    [
        # All are in time if the long one, which holds the queue up for 10 s, starts last.
        ({"long": 6.0, "a": 8.0, "b": 9.0}, ["a", "b", "long"]),
        # It cannot be in time without making the others late.
        ({"long": 1.5, "a": 1.2, "b": 3.0}, ["a", "b", "long"]),
        ({"long": 1.5, "a": 20.0, "b": 30.0}, ["long", "a", "b"]),
    ],
)
def test_a_queue_knows_how_long_requests_run(
    objectives: dict[str, float], order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First tokens are equally soon out, but answers of "long" take 20 s and others 2 s."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gate_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def main() -> list[str]:
        gate = Gate("g", GpuSettings(max_running=2))
        for kind, seconds in (("long", 20), ("a", 2), ("b", 2)):
            async with gate.turn(Ticket(0, 1e12, 0.1, kind)):
                clock.now += seconds
        for _ in range(2):
            await gate.enter(Ticket(0, 0, 0))
        done: list[str] = []

        async def one(kind: str, objective: float) -> None:
            async with gate.turn(Ticket(clock.now, clock.now + objective, 0.1, kind)):
                done.append(kind)

        tasks = [asyncio.create_task(one(*entry)) for entry in objectives.items()]
        await asyncio.sleep(0)
        gate.leave()
        await asyncio.gather(*tasks)
        return done

    assert asyncio.run(main()) == order


@dataclass(frozen=True)
class Request:
    objective: int
    first: int
    kind: str


requests = st.lists(
    st.builds(Request, st.integers(0, 40), st.integers(0, 3), st.sampled_from("abc")), max_size=6
)


@given(requests, st.tuples(*[st.integers(3, 20)] * 3))
def test_no_order_of_a_queue_has_more_first_tokens_in_time(
    found: list[Request], runs: tuple[int, int, int]
) -> None:
    """First tokens come while a request runs, and the next one begins when it has ended."""
    gate = Gate("g", GpuSettings(max_running=1))
    seconds = dict(zip("abc", runs, strict=True))
    for kind, ran in seconds.items():
        gate._learn(kind, ran)
    tickets = [Ticket(0, each.objective, each.first, each.kind) for each in found]
    for each in tickets:
        gate._plan(each)

    def met(order: Iterable[Ticket]) -> int:
        now = in_time = 0
        for each in order:
            in_time += now + each.first_s <= each.objective
            now += seconds[each.kind]
        return in_time

    kept, missed = schedule(tickets, 0)
    assert met([*kept, *missed]) == len(kept) == max(map(met, itertools.permutations(tickets)))


@pytest.mark.parametrize("granted", [False, True])
def test_a_cancelled_request_gives_up_its_place(granted: bool) -> None:
    async def main() -> None:
        gate = Gate("g", GpuSettings(max_running=1))
        await gate.enter(ticket(0))
        first = asyncio.create_task(gate.enter(ticket(1)))
        second = asyncio.create_task(gate.enter(ticket(2)))
        await asyncio.sleep(0)
        # Either order within one turn of the loop: the place goes to the second in both.
        if granted:
            gate.leave()
            first.cancel()
        else:
            first.cancel()
            gate.leave()
        await asyncio.wait_for(second, 5)
        assert first.cancelled()
        assert (gate.running, gate.waiting) == (1, 0)

    asyncio.run(main())


def test_a_larger_queue_lets_the_waiting_in() -> None:
    async def main() -> None:
        gate = Gate("g", GpuSettings(max_running=1))
        await gate.enter(ticket(0))
        waiting = asyncio.create_task(gate.enter(ticket(1)))
        await asyncio.sleep(0)
        gate.configure(GpuSettings(max_running=2))
        await asyncio.wait_for(waiting, 5)
        assert gate.running == 2

    asyncio.run(main())
