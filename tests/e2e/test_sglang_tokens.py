# SPDX-License-Identifier: Apache-2.0
"""The elastic SGLang gives the stock engine's tokens, while its memory comes and goes.

Everything not in use is unmapped at once in these runs, so a stray access ends the engine, and
SGLang's own checks run after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvcached_core import Ledger
from tests.support.elastic import NAME, check_account, elastic_env, ledger_path
from tests.support.load import Burst
from tests.support.server import burst
from tests.support.sglang_fixtures import References, Serve, retracted, wait_retracted
from tests.support.sglang_server import SglangServer
from tests.support.watch import LedgerWatch, wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One way to run the engine."""

    name: str
    args: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    prompts: int = 32
    """How many of the mixed ones: small chunks take long."""

    @property
    def caches(self) -> bool:
        return "--disable-radix-cache" not in self.args


# One token takes 2 KiB.
CASES = [
    Case("as-it-comes"),
    Case("no-cache-chunked", ("--disable-radix-cache", "--chunked-prefill-size=128"), prompts=14),
    Case("slots", ("--page-size=1",)),
    Case("slots-no-cache-chunked-no-overlap",
         ("--page-size=1", "--disable-radix-cache", "--chunked-prefill-size=200",
          "--disable-overlap-schedule"), prompts=14),
    # 192 KiB against blocks of 128 KiB: every other block lies on two pages.
    Case("pages-of-64-straddling", ("--page-size=64", "--chunked-prefill-size=256"),
         {"page_size": "192KiB"}),
    Case("pages-of-64-no-cache", ("--page-size=64", "--disable-radix-cache"),
         {"page_size": "1MiB"}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_stock_engine(
    case: Case, serve: Serve, sglang_references: Callable[[], References], tmp_path: Path
) -> None:
    folder = tmp_path / "ledger"
    # More than all requests take at once, and no more: SGLang's checks look at every slot.
    env = elastic_env(folder, **{"capacity": "64MiB", **case.settings})
    with LedgerWatch(ledger_path(folder)) as watch, serve("engine", case.args, env) as server:
        references = sglang_references()
        mixed = references.mixed.part(0, case.prompts, references.mixed.max_tokens)
        mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
        cached = server.metrics().get("sglang:cached_tokens_total", 0)
        mixed.check(burst(server, mixed.prompts, mixed.max_tokens))
        hits = server.metrics().get("sglang:cached_tokens_total", 0) - cached
        assert (hits > sum(map(len, mixed.prompts)) * 3 // 4) == case.caches, f"{hits} were cached"
        _check_under_moving_limit(case, server, references, Ledger(watch.path))
    check_account(watch)


def _check_under_moving_limit(
    case: Case, server: SglangServer, references: References, ledger: Ledger
) -> None:
    """Answers are right though half of the memory is taken from the requests as they run."""

    def leased() -> int:
        (info,) = ledger.members()
        assert info.name == NAME
        return info.leased

    (info,) = ledger.members()
    growing = references.growing
    prompt_bytes = 2048 * len(growing.prompts) * len(growing.prompts[0])
    ledger.trim(info.slot, info.generation, -1, cached=True)
    wait_until(lambda: leased() <= 2 * MIB, 15, "idle and empty")
    before = retracted(server)
    running = Burst(server, growing.prompts, growing.max_tokens)
    wait_until(lambda: leased() > prompt_bytes, 60, "all run")
    ledger.set_policy(info.slot, info.generation, limit=prompt_bytes // 2)
    wait_retracted(server, before)
    wait_until(lambda: leased() <= prompt_bytes // 2, 30, "within its limit")
    assert running.pending > len(growing.prompts) // 2, "the limit came too late to matter"
    ledger.set_policy(info.slot, info.generation, limit=-1)
    growing.check(running.wait())
    wait_until(
        lambda: case.caches or leased() <= 2 * MIB, 15, "gives everything back when it is idle"
    )
