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
    block_tokens: int = 16

    @property
    def caches(self) -> bool:
        return "--disable-radix-cache" not in self.args


# One token takes 2 KiB.
CASES = [
    Case("as-it-comes"),
    Case("no-cache-chunked", ("--disable-radix-cache", "--chunked-prefill-size=128")),
    Case("slots", ("--page-size=1",), block_tokens=1),
    Case("slots-no-cache-chunked-no-overlap",
         ("--page-size=1", "--disable-radix-cache", "--chunked-prefill-size=96",
          "--disable-overlap-schedule"), block_tokens=1),
    # 192 KiB against blocks of 128 KiB: every other block lies on two pages.
    Case("pages-of-64-straddling", ("--page-size=64", "--chunked-prefill-size=256"),
         {"page_size": "192KiB"}, 64),
    Case("pages-of-64-no-cache", ("--page-size=64", "--disable-radix-cache"),
         {"page_size": "1MiB"}, 64),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_stock_engine(
    case: Case, serve: Serve, sglang_references: Callable[[], References], tmp_path: Path
) -> None:
    folder = tmp_path / "ledger"
    with (
        LedgerWatch(ledger_path(folder)) as watch,
        serve("engine", case.args, elastic_env(folder, **case.settings)) as server,
    ):
        references = sglang_references()
        references.mixed.check(burst(server, references.mixed.prompts, references.mixed.max_tokens))
        cached = server.metrics().get("sglang:cached_tokens_total", 0)
        references.mixed.check(burst(server, references.mixed.prompts, references.mixed.max_tokens))
        hits = server.metrics().get("sglang:cached_tokens_total", 0) - cached
        assert (hits > 15_000) == case.caches, f"{hits} tokens of the second round were cached"
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
