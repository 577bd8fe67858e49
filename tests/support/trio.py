# SPDX-License-Identifier: Apache-2.0
"""Three servers on one ledger, started once for all end-to-end tests that name this plugin.

Their policies differ from test to test, and can be changed at run time, so the servers need not
be started again: `trio` is as good as new every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from .cluster import MIB, Cluster
from .load import Burst
from .prompts import equal_prompts
from .server import VllmHost
from .watch import wait_until

CAPACITY = 48 * MIB
# Each may have its own and the 12 MiB that are guaranteed to nobody.
GUARANTEES = {"large": 20 * MIB, "middle": 12 * MIB, "small": 4 * MIB}
ARGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=4096",
    "--max-num-seqs=64",
    "--max-num-batched-tokens=2048",
    f"--kv-cache-memory-bytes={512 * MIB}",
)


class Models(Protocol):
    llama: Path


@pytest.fixture(scope="session")
def _trio(
    models: Models, vllm_patched: VllmHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("trio")
    cluster = Cluster(models.llama, folder, CAPACITY, ARGS, vllm_patched)
    for name, guarantee in GUARANTEES.items():
        cluster.server(name, guarantee=str(guarantee))
    try:
        cluster.start()
        # The first prompts cost seconds more than later ones, which would pass for slow reclaim.
        warm = [Burst(s, equal_prompts(3, 1050, 1), 4) for s in cluster.servers.values()]
        for burst in warm:
            burst.wait()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def trio(_trio: Cluster) -> Cluster:
    """The servers with no policy beyond their guarantees at start, and nothing cached."""
    for name, server in _trio.servers.items():
        assert server.code is None, f"{name} died: {server.output()[-3000:]}"
        wait_until(lambda name=name: _trio.member(name).demand == 0, 30, f"{name} is idle")
        # Guarantees last, all of which fit together only as they were at start.
        _trio.set_policy(name, guarantee=0, limit=-1, weight=100, priority=0, cache_limit=-1)
    for name, guarantee in GUARANTEES.items():
        _trio.set_policy(name, guarantee=guarantee)
        _trio.empty(name)
    return _trio
