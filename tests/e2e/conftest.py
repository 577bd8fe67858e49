# SPDX-License-Identifier: Apache-2.0
"""Engines for the end-to-end tests: started once, shared by all of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.elastic import elastic_env, ledger_path
from tests.support.engines import EngineHost, Flavor, Job, Result, engine_folder
from tests.support.prompts import TWIN_LENGTH, mixed_batches, twins
from tests.support.server import Server, VllmHost
from tests.support.sglang_server import sglang_folder
from tests.support.tiny_model import COHERE2, GEMMA3, LFM2, LLAMA, make_tiny_model

MIB = 1 << 20
PAIRS = 8
CAPACITY = 48 * MIB
SERVER_PAGE = 256 << 10  # One block of the tiny Llama.
SERVER_PARKED = 1 * MIB
SERVER_ARGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=4096",
    "--max-num-seqs=64",
    "--max-num-batched-tokens=2048",
    f"--kv-cache-memory-bytes={512 * MIB}",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of an engine that is not there, and puts the long ones first."""
    missing = []
    if engine_folder("patched") is None:
        missing.append((lambda name: "sglang" not in name or "vllm" in name, "ENGINE_PATCHED"))
    if sglang_folder("patched") is None or sglang_folder("stock") is None:
        missing.append((lambda name: "sglang" in name, "SGLANG_STOCK and SGLANG_PATCHED"))
    for item in items:
        for needed, names in missing:
            if item.path.parent == Path(__file__).parent and needed(item.path.name):
                reason = f"needs a patched engine: set {names} to its folder, or use `nox -s e2e`"
                item.add_marker(pytest.mark.skip(reason=reason))
    order = {group: place for place, group in enumerate(LONG)}
    items.sort(key=lambda item: order.get(_group(item.path.name), len(LONG)))


# Tests of a file, and of those that share what takes long to start, belong in one process.
GROUPS = {
    "test_memory_follows_load": "vllm",
    "test_metrics": "vllm",
    "test_off": "vllm",
    "test_refusals": "vllm",
    "test_tokens": "vllm",
    "test_two_servers": "vllm",
    "test_sglang_dp": "sglang",
    "test_sglang_memory": "sglang",
    "test_sglang_refusals": "sglang",
    "test_sglang_tokens": "sglang",
    "test_sglang_tp": "sglang",
}
# Those that take longest, longest first: none of them is left when the others are done.
LONG = (
    "vllm",
    "sglang",
    "test_router_vllm_sglang",
    "test_sglang_states",
    "test_sglang_windows",
    "test_sglang_sleep",
    "test_sleep",
    "test_router_sleep",
    "test_sglang_beside_vllm",
    "test_sglang_pools",
)


def _group(path: str) -> str:
    stem = Path(path).stem
    return GROUPS.get(stem, stem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    # Its own groups, `--dist loadgroup`, are names of tests, which pytest 9.2 lets nobody change.
    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # It would begin with where most tests are.
    return Scheduling(config, log)


@dataclass(frozen=True)
class Models:
    """Model directories."""

    llama: Path
    gemma: Path
    cohere: Path
    lfm: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models(
        make_tiny_model(folder / "llama", LLAMA),
        make_tiny_model(folder / "gemma3", GEMMA3),
        make_tiny_model(folder / "cohere2", COHERE2),
        make_tiny_model(folder / "lfm2", LFM2),
    )


def _host(flavor: Flavor, factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    host = EngineHost(flavor, factory.mktemp(f"{flavor}-host"))
    yield host
    host.close()


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    """Runs jobs on the stock engine."""
    yield from _host("stock", tmp_path_factory)


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    """Runs jobs on the patched engine."""
    yield from _host("patched", tmp_path_factory)


@pytest.fixture(scope="session")
def vllm_patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmHost]:
    """Servers of the patched engine are forks of this."""
    host = VllmHost("patched", tmp_path_factory.mktemp("vllm-patched"))
    yield host
    host.close()


LLAMA_BATCHES = [*mixed_batches(), twins(PAIRS)]
GEMMA_BATCHES = [*mixed_batches(batches=2), twins(PAIRS)]
FEW_BATCHES = [*mixed_batches(batches=1), twins(PAIRS)]
LONG_ANSWER = 160
"""Tokens: so many more than an engine reckons with when it lets requests in that it preempts."""


class References:
    """What the stock engine answers, computed once, while other tests go on."""

    def __init__(self, host: EngineHost, models: Models) -> None:
        self._runs: dict[str, Future[Result]] = {
            "llama": host.submit(Job(models.llama, LLAMA_BATCHES)),
            "gemma": host.submit(Job(models.gemma, GEMMA_BATCHES)),
        }
        for model in ("llama", "gemma"):
            job = Job(getattr(models, model), FEW_BATCHES, max_tokens=LONG_ANSWER)
            self._runs[f"{model}-long"] = host.submit(job)

    def __getitem__(self, model: str) -> Result:
        result = self._runs[model].result().require()
        folder = engine_folder("patched")
        assert folder is not None and not result.vllm.startswith(str(folder))
        check_far_tokens_matter(result)
        return result


def check_far_tokens_matter(result: Result) -> None:
    """Without this every comparison of tokens would be empty: see `tiny_model`."""
    answers = result.tokens[-2 * PAIRS :]
    equal = sum(a == b for a, b in zip(answers[::2], answers[1::2], strict=True))
    assert equal == 0, f"{equal} of {PAIRS} answers ignore what is {TWIN_LENGTH} tokens back"
    flat = [token for answer in result.tokens for token in answer]
    assert len(set(flat)) > 500, f"only {len(set(flat))} different tokens"


@pytest.fixture(scope="session")
def references(stock: EngineHost, models: Models) -> References:
    return References(stock, models)


class Pair:
    """Two servers on one ledger that is smaller than what both would take.

    `plain` keeps nothing when idle; `caching` keeps its prefix cache until somebody needs the
    memory.
    """

    def __init__(self, models: Models, host: VllmHost, folder: Path) -> None:
        self._model = models.llama
        self._host = host
        self.folder = folder
        self.ledger = ledger_path(folder / "ledger")
        self.plain = self._server("plain", "--no-enable-prefix-caching")
        self.caching = self._server("caching", "--enable-prefix-caching")

    def _server(self, name: str, *args: str) -> Server:
        env = elastic_env(
            self.ledger.parent,
            name=name,
            capacity=str(CAPACITY),
            page_size=str(SERVER_PAGE),
            parked=str(SERVER_PARKED),
            parked_decay_ms="200",
        )
        return Server(name, self._model, self.folder, (*SERVER_ARGS, *args), env, host=self._host)

    def start(self) -> None:
        for server in (self.plain, self.caching):
            server.start()
        for server in (self.plain, self.caching):
            server.wait_ready()

    def stop(self) -> None:
        for server in (self.plain, self.caching):
            server.stop()


@pytest.fixture(scope="session")
def _pair(
    models: Models, vllm_patched: VllmHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    pair = Pair(models, vllm_patched, tmp_path_factory.mktemp("servers"))
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Two running servers; a test that killed one has its successor started here."""
    for server in (_pair.plain, _pair.caching):
        if server.code is not None:
            server.start()
            server.wait_ready()
    return _pair
