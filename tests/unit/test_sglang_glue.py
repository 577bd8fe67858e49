# SPDX-License-Identifier: Apache-2.0
"""What the SGLang patches call: on plain objects with the attributes SGLang's have, and ranks that
are threads of this process over real arenas and a real ledger.
"""

from __future__ import annotations

import json
import pickle
import random
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as NS
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from kvcached_core import ConfigError, Ledger
from kvcached_core.lockstep import PassOrder
from kvcached_core.sglang import (
    _STUCK_PASSES,
    SglangRank,
    check_backends,
    check_model,
    check_supported,
    load_config,
    load_of,
)
from kvcached_core.waker import Waker
from tests.support.little_sglang import Abort, Arrival, Batch, LittleSglang, Sampling

PAGE = 1 << 16


def server_args(directory: Path | None = None, kvcached: Any = None, **changes: Any) -> NS:
    settings = {"page_size": PAGE, "capacity": 64 * PAGE, "start_wait_ms": 0, "name": "engine"}
    settings |= {"commit_ahead": 0, "parked_decay_ms": 0, "ledger_dir": str(directory)}
    plain: dict[str, Any] = {
        "device": "cpu",
        "kvcached_config": json.dumps(settings | (kvcached or {})) if directory else None,
        "mem_fraction_static": 0.8,
        "disaggregation_mode": "null",
        "enable_hierarchical_cache": False,
        "enable_lmcache": False,
        "enable_hisparse": False,
        "speculative_algorithm": None,
        "enable_memory_saver": False,
        "enable_unified_memory": False,
        "enable_page_major_kv_layout": False,
        "enable_mixed_chunk": False,
        "pp_size": 1,
        "enable_dp_attention": False,
        "dcp_size": 1,
        "attn_cp_size": 1,
        "nnodes": 1,
        "scheduler_recv_interval": 1,
        "enable_pdmux": False,
        "dllm_algorithm": None,
        "kv_cache_dtype": "auto",
        "prefill_only_disable_kv_cache": False,
        "enable_int8_mamba_checkpoint": False,
        "enable_linear_replayssm": False,
    }
    assert changes.keys() <= plain.keys()
    return NS(**plain | changes)


# -- what is refused --------------------------------------------------------------------------

OBSTACLES = [
    ({"device": "npu"}, "'npu'.*use cuda or cpu"),
    ({"disaggregation_mode": "prefill"}, "drop --disaggregation-mode"),
    ({"enable_hierarchical_cache": True}, "drop --enable-hierarchical-cache"),
    ({"enable_lmcache": True}, "drop --enable-lmcache"),
    ({"enable_hisparse": True}, "drop --enable-hisparse"),
    ({"speculative_algorithm": "EAGLE"}, "drop --speculative-algorithm"),
    ({"enable_unified_memory": True}, "drop --enable-unified-memory"),
    ({"enable_page_major_kv_layout": True}, "drop --enable-page-major-kv-layout"),
    ({"enable_mixed_chunk": True}, "drop --enable-mixed-chunk"),
    ({"pp_size": 2}, "use --pp-size 1"),
    ({"enable_dp_attention": True}, "drop --enable-dp-attention"),
    ({"dcp_size": 2}, "use --dcp-size 1"),
    ({"attn_cp_size": 2}, "--attn-cp-size 1"),
    ({"nnodes": 2}, "use --nnodes 1"),
    ({"scheduler_recv_interval": 2}, "use --scheduler-recv-interval 1"),
    ({"enable_pdmux": True}, "drop --enable-pdmux"),
    ({"dllm_algorithm": "LowConfidence"}, "drop --dllm-algorithm"),
    ({"kv_cache_dtype": "fp4_e2m1"}, "fp4_e2m1.*use auto or fp8"),
    ({"prefill_only_disable_kv_cache": True}, "drop --prefill-only-disable-kv-cache"),
    ({"enable_int8_mamba_checkpoint": True}, "drop --enable-int8-mamba-checkpoint"),
    ({"enable_linear_replayssm": True}, "drop --enable-linear-replayssm"),
]
VARIABLES = [
    "SGLANG_USE_HND_KVCACHE",
    "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",
    "SGLANG_ENABLE_UNIFIED_RADIX_TREE",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", "bfloat16"])
def test_a_plain_engine_is_supported(device: str, kv_cache_dtype: str) -> None:
    check_supported(server_args(device=device, kv_cache_dtype=kv_cache_dtype))


@pytest.mark.parametrize(("change", "words"), OBSTACLES)
def test_what_cannot_work_is_refused_with_the_remedy(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check_supported(server_args(**change))
    assert str(error.value).count("\n  - ") == 1
    assert "switch it off: unset ENABLE_KVCACHED" in str(error.value)


@pytest.mark.parametrize("name", VARIABLES)
def test_so_are_variables_that_change_the_pools(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    check_supported(server_args())
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"unset .*{name}|{name}.*unset it"):
        check_supported(server_args())


def test_all_obstacles_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    everything: dict[str, Any] = {}
    for change, _ in OBSTACLES:
        everything |= change
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as error:
        check_supported(server_args(**everything))
    # Two of them share a line with another each: context parallelism and the trees.
    assert str(error.value).count("\n  - ") == len(OBSTACLES) - 1 + len(VARIABLES) - 1


def test_attention_backends_must_read_by_the_stride() -> None:
    check_backends(["triton", "fa3", "flashinfer", "torch_native", None])
    with pytest.raises(ConfigError, match=r"cutlass_mla, trtllm_mha .*--attention-backend"):
        check_backends(["trtllm_mha", "triton", "cutlass_mla", None])


PLAIN_MODEL = dict.fromkeys(
    ("only_windows", "windows_and_states", "amx_states", "sparse", "fp8_mla"), False
)


@pytest.mark.parametrize(
    ("trait", "words"),
    [
        ("only_windows", "pass --disable-hybrid-swa-memory"),
        ("windows_and_states", "pass --disable-hybrid-swa-memory"),
        ("amx_states", "states are laid out for AMX"),
        ("sparse", "sparse attention"),
        ("fp8_mla", "use --kv-cache-dtype auto"),
    ],
)
def test_models_with_other_pools_are_refused(trait: str, words: str) -> None:
    check_model(**PLAIN_MODEL)
    with pytest.raises(ConfigError, match=words):
        check_model(**PLAIN_MODEL | {trait: True})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'name': 'x'}", r"--kvcached-config is not JSON \(.*\): .*name"),
        ("[1, 2]", "must be a JSON object"),
        ('{"colour": "red"}', "no setting 'colour'"),
        ('{"page_size": "many"}', "KVCACHED_PAGE_SIZE"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(text: str, words: str) -> None:
    args = server_args()
    args.kvcached_config = text
    with pytest.raises(ConfigError, match=words):
        check_supported(args)


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_NAME", "from-environment")
    monkeypatch.setenv("KVCACHED_PAGE_SIZE", "4MiB")
    args = server_args()
    assert load_config(args).name == "from-environment"
    args.kvcached_config = '{"name": "from-flag"}'
    assert load_config(args).name == "from-flag"
    assert load_config(args).page_size == 4 << 20


# -- what an engine is about to run -----------------------------------------------------------


@dataclass(eq=False)
class Req:
    """A request in SGLang's queues."""

    origin_input_ids: Sequence[int]
    output_ids: list[int] = field(default_factory=list)
    kv_committed_len: int = 0
    sampling_params: Any = field(default_factory=lambda: NS(max_new_tokens=100, ignore_eos=False))


@dataclass
class Engine:
    """SGLang's scheduler, as far as its load is read from it."""

    running_batch: Batch = field(default_factory=Batch)
    last_batch: Batch | None = None
    waiting_queue: list[Req] = field(default_factory=list)
    chunked_req: Req | None = None
    max_prefill_tokens: int = 1000
    chunked_prefill_size: int | None = 256
    new_token_ratio_tracker: Any = field(default_factory=lambda: NS(current=0.5))


def prompt(tokens: int, most: int | None = 100) -> Req:
    return Req(range(tokens), sampling_params=NS(max_new_tokens=most, ignore_eos=False))


def running(prompt: int, made: int, most: int = 100) -> Req:
    """Its last token is not in the cache yet."""
    return Req(
        range(prompt), [0] * made, prompt + made - 1, NS(max_new_tokens=most, ignore_eos=False)
    )


def test_an_idle_engine_has_no_load() -> None:
    assert load_of(Engine(), [], 16) is None
    assert load_of(Engine(), [NS(rid="an abort, say"), NS(input_ids=None)], 16) is None


@pytest.mark.parametrize(
    "change",
    [
        {"running_batch": Batch([prompt(5)])},
        {"last_batch": Batch()},
        {"waiting_queue": [prompt(5)]},
        {"chunked_req": prompt(5)},
    ],
)
def test_whoever_has_anything_to_do_has_a_load(change: dict[str, Any]) -> None:
    assert load_of(Engine(**change), [], 16) is not None


def test_running_requests_take_a_block_when_theirs_are_full() -> None:
    batch = Batch([running(16, 1), running(16, 2), running(31, 2), running(40, 1)])
    load = load_of(Engine(batch), [], 16)
    assert load is not None
    assert (
        load.needs[0].running_blocks
        == load.needs[0].needed_blocks
        == load.needs[0].wanted_blocks
        == 2
    )
    assert [(r.num_tokens, r.num_computed_tokens) for r in load.running] == [
        (17, 16),
        (18, 17),
        (33, 32),
        (41, 40),
    ]
    assert [r.num_tokens for r in load.running[1:3]] == [18, 33]
    assert len(load.waiting) == 0


def test_a_prefill_that_was_launched_is_running() -> None:
    first, second = running(16, 1), running(16, 1)
    assert (
        load_of(Engine(Batch([first]), Batch([second], extends=True)), [], 16)
        .needs[0]
        .running_blocks
        == 2
    )
    # A decode step's requests are those of the running batch.
    assert load_of(Engine(Batch([first]), Batch([first])), [], 16).needs[0].running_blocks == 1
    batch = Batch([first], extends=True)
    assert load_of(Engine(batch, batch), [], 16).needs[0].running_blocks == 1


def test_waiting_requests_take_as_much_as_one_prefill_may_have() -> None:
    waiting = [prompt(100), prompt(17), prompt(500), prompt(500)]
    load = load_of(Engine(waiting_queue=waiting), [], 16)
    assert load is not None
    # 100, 17 and 139 of the third; each may leave a page unfilled.
    assert load.needs[0].needed_blocks == (7 + 1) + (2 + 1) + (9 + 1)
    assert load.needs[0].running_blocks == 0
    assert load.needs[0].first_blocks == 7 + 1
    assert [r.num_tokens for r in load.waiting] == [100, 17, 500, 500]


def test_what_just_came_in_waits_too() -> None:
    queue = [prompt(100)]
    new = Arrival(1, range(50), Sampling(10), 5)
    load = load_of(Engine(waiting_queue=queue), [NS(rid="abort"), new], 16)
    assert load is not None
    assert load.needs[0].needed_blocks == (7 + 1) + (4 + 1)
    assert [r.num_tokens for r in load.waiting] == [100, 50]
    assert [r.num_computed_tokens for r in load.waiting] == [0, 0]


def test_without_chunks_the_first_is_admitted_whatever_its_length() -> None:
    engine = Engine(waiting_queue=[prompt(5000), prompt(16)], chunked_prefill_size=None)
    assert load_of(engine, [], 16).needs[0].needed_blocks == -(-5000 // 16) + 1
    engine.waiting_queue = [prompt(800), prompt(500), prompt(16)]
    assert load_of(engine, [], 16).needs[0].needed_blocks == (50 + 1) + (13 + 1)


def test_a_chunk_larger_than_a_prefill_must_fit_too() -> None:
    # SGLang cuts by the chunk size alone, and lets no request in whose chunk does not fit.
    engine = Engine(waiting_queue=[prompt(900)], max_prefill_tokens=64)
    assert load_of(engine, [], 16).needs[0].needed_blocks == 16 + 1


def test_a_chunk_in_progress_goes_first_and_keeps_what_it_lacks() -> None:
    chunked = Req(range(1000), kv_committed_len=256)
    decoding = running(16, 1)
    engine = Engine(Batch([decoding]), Batch([chunked], extends=True), [prompt(40)], chunked)
    load = load_of(engine, [], 16)
    assert load is not None
    assert load.needs[0].running_blocks == 1 + 16 + 1
    assert (
        load.needs[0].needed_blocks == 1 + 16 + 1
    )  # nothing is left of the chunk size for the next
    # Not counted twice, and the last to be preempted; its prompt and the page it may not fill.
    assert [(r.num_tokens, r.num_computed_tokens) for r in load.running] == [(1016, 256), (17, 16)]
    chunked.kv_committed_len = 980
    load = load_of(engine, [], 16)
    assert load.needs[0].running_blocks == 1 + 2 + 1
    assert load.needs[0].needed_blocks == 1 + (2 + 1) + (3 + 1)


def test_the_first_is_let_in_when_all_it_may_make_could_be_had() -> None:
    engine = Engine(waiting_queue=[prompt(100, most=60), prompt(1, most=5000)])
    assert load_of(engine, [], 16).needs[0].wanted_blocks == -(-(100 + 60 + 32) // 16)
    # With a share of what those that run may still make.
    engine.running_batch = Batch([running(32, 20, most=60), running(32, 70, most=60)])
    assert load_of(engine, [], 16).needs[0].wanted_blocks == -(-(100 + 60 + 32 + 20) // 16)
    # No more than SGLang counts; None is no bound of its own, and is not known yet.
    engine = Engine(waiting_queue=[prompt(100, most=100_000)])
    assert load_of(engine, [], 16).needs[0].wanted_blocks == -(-(100 + 4096 + 32) // 16)
    engine = Engine(waiting_queue=[prompt(100, most=None)])
    assert load_of(engine, [], 16).needs[0].wanted_blocks == -(-(100 + 32) // 16)


def test_who_ignores_the_end_makes_all_it_may() -> None:
    first, other = prompt(100, most=6000), running(32, 20, most=100)
    for request in (first, other):
        request.sampling_params.ignore_eos = True
    load = load_of(Engine(Batch([other]), waiting_queue=[first]), [], 16)
    assert load is not None
    assert load.needs[0].wanted_blocks == -(
        -(100 + 6000 + 32 + 80) // 16
    )  # neither cut nor in part


def test_what_was_preempted_begins_with_what_it_made() -> None:
    retracted = Req(range(30), [0] * 10)
    load = load_of(Engine(waiting_queue=[retracted]), [], 16)
    assert load.needs[0].needed_blocks == 3 + 1
    assert load.needs[0].wanted_blocks == -(-(40 + 90 + 32) // 16)


# -- ranks ------------------------------------------------------------------------------------


class Meeting:
    """Where ranks that are threads exchange what processes would send each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._values: list[bytes] = [b""] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = pickle.dumps(value)
        self._barrier.wait()
        values = [pickle.loads(text) for text in self._values]
        self._barrier.wait()
        return values


@dataclass
class ThreadRanks:
    rank: int
    size: int
    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised, all run at the same time."""

    def run(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


class Ranks:
    """All ranks of one engine, each with a small SGLang over its arena."""

    def __init__(self, directory: Path, size: int, **settings: Any) -> None:
        self.directory = directory
        meeting = Meeting(size)
        args = [server_args(directory, settings) for _ in range(size)]
        made = together(
            [lambda i=i: SglangRank(args[i], 0, ThreadRanks(i, size, meeting)) for i in range(size)]
        )
        assert all(isinstance(rank, SglangRank) for rank in made), made
        self.ranks: list[SglangRank] = made

    def open(self, num_blocks: int = 400, block_bytes: int = PAGE // 4) -> list[Any]:
        return together(
            [lambda rank=rank: rank.open(num_blocks, block_bytes, 16) for rank in self.ranks]
        )

    def start(self, num_blocks: int = 400, block_bytes: int = PAGE // 4, **engine: Any) -> Ranks:
        raw = self.open(num_blocks, block_bytes)
        self.arenas = [np.from_dlpack(tensor).reshape(num_blocks, block_bytes) for tensor in raw]
        self.engines = []
        for rank in self.ranks:
            sglang = LittleSglang(rank.allocator, **engine)
            rank.land = sglang.land
            rank.attach(sglang)
            rank.set_cache(sglang.tree)
            self.engines.append(sglang)
        return self

    def turn(self, received: Sequence[Any] = ()) -> list[Any]:
        """One turn of every event loop; returns what went over the wire."""
        first, *others = self.ranks
        wire = first.send(list(received))
        assert wire is not None
        assert all(rank.send(None) is None for rank in others)
        for rank, engine in zip(self.ranks, self.engines, strict=True):
            got = rank.receive(pickle.loads(pickle.dumps(wire)))
            assert got == list(received)
            self.write(rank)
            engine.order = rank.order
            engine.step(got)
        self.check()
        return wire

    def finish(self, most_turns: int = 1000) -> None:
        """Go on until nothing is left to do."""
        for _ in range(most_turns):
            if self.engines[0].is_idle():
                return
            self.turn()
        pytest.fail("somebody waits for ever")

    def write(self, rank: SglangRank) -> None:
        """Use all that may be used: it faults where there is no memory."""
        allocator = rank.allocator
        blocks = [*allocator.free_order(), *allocator.live_array()]
        self.arenas[self.ranks.index(rank)][blocks] = 7

    def check(self) -> None:
        first, *others = (rank.allocator for rank in self.ranks)
        for other in others:
            assert other.num_uncommitted == first.num_uncommitted
            assert other.free_order() == first.free_order()
            assert other.live_array().tolist() == first.live_array().tolist()
        told = {
            (r.order.room().reachable_blocks, r.order.room().withheld_blocks) for r in self.ranks
        }
        assert len(told) == 1

    def settle(self) -> None:
        """The workers have done what they were told to."""
        for rank in self.ranks:
            rank._pools[0].arenas[0]._mapper.drain()
            backed = {0, *rank.allocator.free_order(), *rank.allocator.live_array().tolist()}
            arena = rank._pools[0].arenas[0]._arena
            assert {b for b in range(len(self.arenas[0])) if arena.is_committed(b)} == backed

    def ledger(self) -> Ledger:
        return Ledger(str(self.directory / "host-0.ledger"), 64 * PAGE)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path, request.param)
    yield ranks
    ranks.close()


def test_the_virtual_size_is_the_least_of_all_ranks(tmp_path: Path) -> None:
    assert Ranks(tmp_path, 1).ranks[0].virtual_bytes == 62 * PAGE
    assert [r.virtual_bytes for r in Ranks(tmp_path, 2).ranks] == [30 * PAGE] * 2
    bounded = Ranks(tmp_path, 2, max_kv=5 * PAGE)
    assert [r.virtual_bytes for r in bounded.ranks] == [5 * PAGE] * 2
    meeting = Meeting(2)
    uneven = [server_args(tmp_path), server_args(tmp_path, {"max_kv": 3 * PAGE})]
    made = together(
        [lambda i=i: SglangRank(uneven[i], 0, ThreadRanks(i, 2, meeting)) for i in range(2)]
    )
    assert [rank.virtual_bytes for rank in made] == [3 * PAGE] * 2


def test_every_rank_has_an_arena_and_the_first_the_ledger(ranks: Ranks) -> None:
    ranks.start()
    size = len(ranks.ranks)
    assert [arena.shape for arena in ranks.arenas] == [(400, PAGE // 4)] * size
    assert [rank.scheduler is None for rank in ranks.ranks] == [False, True][:size]
    assert [rank.pages_filled(11) for rank in ranks.ranks] == [2] * size
    (member,) = ranks.ledger().members()
    assert member.name == "engine"
    assert member.leased == member.committed == size * PAGE  # the null block's page
    for rank, arena in zip(ranks.ranks, ranks.arenas, strict=True):
        assert rank.allocator.num_blocks == 400
        arena[0] = 3
        assert (arena[0] == 3).all()


def test_a_rank_has_pools_of_states_and_of_tokens(ranks: Ranks) -> None:
    size = len(ranks.ranks)
    sizes = [(PAGE // 2 + 64, 3), (128, 3)]  # slots that straddle pages, and many to a page
    states = together([lambda r=r: r.open_states(20, sizes, 2) for r in ranks.ranks])
    tokens = together([lambda r=r: r.open(400, PAGE // 4, 16) for r in ranks.ranks])
    (member,) = ranks.ledger().members()
    assert ranks.ranks[0].state_bytes(sizes, 0) >= 3 * PAGE + 3 * PAGE
    assert ranks.ranks[0].state_bytes(sizes, 4) >= 3 * (4 * (PAGE // 2 + 64) + PAGE) + 3 * PAGE
    null = 3 * PAGE + 3 * PAGE + PAGE
    assert member.leased == member.committed == size * null
    for rank, raw, row in zip(ranks.ranks, states, tokens, strict=True):
        temporal, conv = (np.from_dlpack(tensor) for tensor in raw)
        assert temporal.shape == (3, 20 * (PAGE // 2 + 64)) and conv.shape == (3, 20 * 128)
        assert rank.num_pools == 2
        assert [rank.allocator_of(pool).num_blocks for pool in (0, 1)] == [20, 400]
        temporal.reshape(3, 20, -1)[:, 0] = conv.reshape(3, 20, -1)[:, 0] = 5
        np.from_dlpack(row).reshape(400, -1)[0] = 5
    first = ranks.ranks[0]
    assert first._leader is not None
    load = load_of(Engine(waiting_queue=[prompt(40, 1)] * 4), [], 16, first._kinds())
    assert load is not None
    assert [need.needed_blocks for need in load.needs] == [4 * 2, 4 * (3 + 1)]
    first.order, ops = first._leader.plan(load)
    first._apply(ops)
    for rank in ranks.ranks[1:]:
        assert rank._replica is not None
        rank.order = first.order
        rank._apply(rank._replica.repeat(first.order))
    for rank, raw in zip(ranks.ranks, states, strict=True):
        slots = rank.allocator_of(0).free_order()
        assert len(slots) >= 8
        for tensor in raw:
            array = np.from_dlpack(tensor).reshape(3, 20, -1)
            array[:, slots] = 7  # faults where there is no memory
        assert rank.allocator_of(0).free_order() == ranks.ranks[0].allocator_of(0).free_order()
    pages = [sum(pool.committed_pages()) for pool in first._leader.scheduler.pools]
    (member,) = ranks.ledger().members()
    assert member.committed == size * (3 * pages[0] + pages[1]) * PAGE


def test_a_request_runs_and_its_memory_goes_back(ranks: Ranks) -> None:
    ranks.start()
    ledger, size = ranks.ledger(), len(ranks.ranks)
    ranks.turn([Arrival(1, range(200), Sampling(50), 20)])
    for _ in range(10):
        ranks.turn()
        ranks.settle()
        (member,) = ledger.members()
        assert member.committed <= member.leased <= ledger.capacity
    assert member.committed >= size * 4 * PAGE  # 13 blocks and more of 4 a page
    ranks.finish()
    assert ranks.engines[0].finished == [1]
    # Its prefix is cached; an operator takes it.
    (member,) = ledger.members()
    assert member.cached >= size * 13 * PAGE // 4
    ledger.trim(member.slot, member.generation, cached=True)
    deadline = time.monotonic() + 10
    while ledger.members()[0].trim_pending and time.monotonic() < deadline:
        ranks.turn()
        time.sleep(0.005)
    ranks.settle()
    (member,) = ledger.members()
    assert not member.trim_pending
    assert member.leased == member.committed == size * PAGE
    ranks.close()
    assert ledger.members() == [] and ledger.total_leased() == 0


def test_bytes_return_when_the_last_rank_is_gone(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2).start()
    ranks.turn([Arrival(1, range(200), Sampling(50), 20)])
    ledger = ranks.ledger()
    held = ledger.total_leased()
    assert held > 2 * PAGE
    ranks.ranks[0].close()
    assert ledger.total_leased() > 0  # the other still maps its part
    ranks.ranks[1].close()
    assert ledger.total_leased() == 0 and ledger.members() == []


def test_an_order_is_sent_only_when_it_changed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2).start()
    try:
        wire = ranks.turn([Arrival(1, range(20), Sampling(100), 100)])
        assert isinstance(wire[-1], PassOrder) and len(wire) == 2
        sent = [len(ranks.turn()) for _ in range(64)]
        assert all(n in (0, 1) for n in sent)
        # A token a turn: 16 to a block, and 64 to a page.
        assert 1 <= sum(sent) <= 4
        idle = Ranks(tmp_path / "idle", 2).start()
        received: list[Any] = []
        assert idle.ranks[0].send(received) is received
        idle.close()
    finally:
        ranks.close()


def test_one_rank_sends_no_orders(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 1).start()
    try:
        arrivals = [Arrival(1, range(300), Sampling(50), 20)]
        assert ranks.turn(arrivals) == arrivals
        for _ in range(30):
            assert ranks.turn() == []
        assert ranks.engines[0].is_idle()
    finally:
        ranks.close()


def test_what_comes_between_is_left_alone(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2).start()
    try:
        for rank in ranks.ranks:
            assert rank.receive([]) == []
            assert rank.receive(["an rpc"]) == ["an rpc"]
        assert ranks.ranks[1].send(None) is None
    finally:
        ranks.close()


def test_freed_blocks_land_in_every_pass_of_every_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, parked_decay_ms=100_000).start()
    try:
        ranks.turn([Arrival(1, range(60), Sampling(100), 100)])
        taken = [rank.allocator.allocate(2) for rank in ranks.ranks]
        assert taken[0] == taken[1]
        for block in sorted(taken[0]):
            for engine in ranks.engines:
                engine.free([block])
            wire = ranks.ranks[0].send([])
            assert wire == []  # no order: nothing else makes the second rank look
            assert [rank.receive(wire) for rank in ranks.ranks] == [[], []]
            for rank in ranks.ranks:
                assert block in rank.allocator.free_order()
        ranks.check()
    finally:
        ranks.close()


@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_stay_equal_at_random_beside_a_neighbour(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    ranks = Ranks(tmp_path, 2, priority=0, commit_ahead=rng.choice([0, 2 * PAGE])).start(
        num_blocks=200, chunked_prefill_size=32
    )
    neighbour = ranks.ledger().join("neighbour", priority=1)
    try:
        for i in range(150):
            received: list[Any] = []
            if rng.random() < 0.3:
                tokens = rng.randint(1, 200)
                most = rng.randint(1, 60)
                received = [Arrival(i, range(tokens), Sampling(most), most, rng.randint(0, 2))]
            if rng.random() < 0.2:
                received.append(Abort(rng.randint(max(0, i - 20), i)))
            if rng.random() < 0.2:
                neighbour.lease_up_to(rng.randint(0, 64) * PAGE, PAGE)
            if rng.random() < 0.2:
                neighbour.release(rng.randint(0, neighbour.info().leased // PAGE) * PAGE)
            if rng.random() < 0.1:
                neighbour.set_demand(rng.choice([0, 5, 40]) * PAGE, 1)
            ranks.turn(received)
        neighbour.leave()
        ranks.finish(5000)
        ranks.settle()
    finally:
        ranks.close()


def test_a_request_that_is_given_up_is_waited_for_no_longer(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 1).start()
    neighbour = ranks.ledger().join("neighbour")
    try:
        assert neighbour.lease(60 * PAGE)
        ranks.turn([Arrival(1, range(400), Sampling(50), 20)])
        ranks.turn()
        assert ranks.ledger().total_demand() > 0
        ranks.turn([Abort(1)])
        ranks.turn()
        assert ranks.engines[0].is_idle()
        assert ranks.ledger().total_demand() == 0
    finally:
        ranks.close()


def test_the_first_rank_counts_for_all(ranks: Ranks) -> None:
    ranks.start()
    for rank in ranks.ranks:
        rank.count("cache_hits", 16 * 5 + 3)
        rank.count("cache_evictions", 16 * 2)
    ranks.turn([Arrival(1, range(20), Sampling(5), 5)])  # a pass tells the ledger
    (member,) = ranks.ledger().members()
    assert member.counters["cache_hits"] == 5
    assert member.counters["cache_evictions"] == 2


def test_the_first_rank_exports_what_it_holds(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2).start()
    try:
        for rank in ranks.ranks:
            rank.expose({"model_name": "tiny"})  # registering twice would raise
        ranks.turn([Arrival(1, range(60), Sampling(50), 50)])
        ranks.settle()
        time.sleep(0.6)
        ranks.turn()
        (member,) = ranks.ledger().members()
        name, labels = "sglang:kvcached_committed_bytes", {"model_name": "tiny"}
        assert member.committed == REGISTRY.get_sample_value(name, labels) > 0
    finally:
        ranks.close()


def join_errors(ranks: Ranks, words: str) -> None:
    errors = ranks.open()
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert isinstance(error, ConfigError)
        assert words in str(error)


def test_no_memory_is_told_on_every_rank(ranks: Ranks) -> None:
    neighbour = ranks.ledger().join("neighbour")
    assert neighbour.lease(64 * PAGE)
    join_errors(ranks, "cannot start")
    assert [m.name for m in ranks.ledger().members()] == ["neighbour"]


def test_a_policy_that_does_not_fit_is_told_on_every_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, guarantee="50%")
    neighbour = ranks.ledger().join("neighbour", guarantee=40 * PAGE)
    join_errors(ranks, "neighbour")
    neighbour.leave()


def test_another_capacity_than_that_of_those_who_live_is_told_on_every_rank(
    tmp_path: Path,
) -> None:
    ranks = Ranks(tmp_path, 2, capacity=32 * PAGE)
    neighbour = ranks.ledger().join("neighbour")
    join_errors(ranks, "capacity")
    neighbour.leave()


# -- an engine that sleeps --------------------------------------------------------------------


def readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def test_a_waker_is_readable_until_it_is_drained() -> None:
    waker = Waker()
    assert not readable(waker.fd, 0)
    waker.drain()  # nothing there
    for _ in range(70_000):  # more than a pipe holds
        waker.wake()
    assert readable(waker.fd, 0)
    waker.drain()
    assert not readable(waker.fd, 0)
    threading.Thread(target=waker.wake).start()
    assert readable(waker.fd, 10)


def falls_asleep(ranks: Ranks, fd: int) -> None:
    for _ in range(50):
        if not readable(fd, 0.1):
            return
        ranks.turn()
    pytest.fail("something wakes it again and again")


def test_a_sleeping_engine_is_woken_when_another_member_asks(ranks: Ranks) -> None:
    ranks.start()
    fds = [rank.wake_fd() for rank in ranks.ranks]
    assert fds[0] is not None and all(fd is None for fd in fds[1:])
    ranks.turn([Arrival(1, range(200), Sampling(50), 20)])
    ranks.finish()
    falls_asleep(ranks, fds[0])
    member = ranks.ledger().members()[0]
    assert member.cached > 0
    neighbour = ranks.ledger().join("neighbour")
    all_but_null_blocks = (64 - len(ranks.ranks)) * PAGE
    assert not neighbour.lease(all_but_null_blocks)
    neighbour.set_demand(all_but_null_blocks, 1)
    neighbour.ask()
    assert readable(fds[0], 10)
    deadline = time.monotonic() + 10
    while neighbour.claimable() < all_but_null_blocks and time.monotonic() < deadline:
        if readable(fds[0], 1):
            ranks.turn()
    assert neighbour.lease(all_but_null_blocks)
    falls_asleep(ranks, fds[0])


def test_an_engine_that_cannot_run_waits_a_moment_for_memory(ranks: Ranks) -> None:
    ranks.start()
    ranks.ranks[0].pause()  # there was news: the engine joined
    begin = time.monotonic()
    ranks.ranks[0].pause()
    assert 0.001 < time.monotonic() - begin < 5
    for rank in ranks.ranks[1:]:
        rank.pause()  # the first one's is enough, as the others wait for it


def test_closing_twice_is_closing(ranks: Ranks) -> None:
    ranks.start()
    ranks.close()
    ranks.close()
    assert ranks.ledger().members() == []


def test_an_engine_that_can_run_nothing_for_long_is_told(ranks: Ranks) -> None:
    ranks.start()
    for rank in ranks.ranks:
        told = []
        for _ in range(2 * _STUCK_PASSES):
            rank.receive([])
            told.append(rank.pause())
        assert [i + 1 for i, now in enumerate(told) if now] == [_STUCK_PASSES, 2 * _STUCK_PASSES]
        rank.receive([])  # something ran
        for _ in range(_STUCK_PASSES - 1):
            rank.receive([])
            assert not rank.pause()
