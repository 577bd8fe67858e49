# SPDX-License-Identifier: Apache-2.0
"""The elastic engine gives the stock engine's tokens, and the same log probabilities: to the bit,
where the stock engine's own do not depend on the batch.

Everything not in use is unmapped at once in these runs, so a stray access ends the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import (
    FEW_BATCHES,
    GEMMA_BATCHES,
    LLAMA_BATCHES,
    LONG_ANSWER,
    Models,
    References,
)
from tests.support.elastic import check_account, elastic_env, ledger_path
from tests.support.engines import EngineHost, Job, Result, same_bits
from tests.support.watch import LedgerWatch, read, wait_until

pytestmark = pytest.mark.timeout(600)

# Summing over two ranks, or in tiles, rounds otherwise: far below this, and near-ties may turn.
TIE = 1e-4


@dataclass(frozen=True)
class Case:
    """One way to run the engine."""

    name: str
    model: str = "llama"
    engine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    in_process: bool = True
    preempts: bool = False
    exact: bool = True


CASES = [
    Case("prefix-caching"),
    Case("no-prefix-caching-2MiB", engine={"enable_prefix_caching": False},
         settings={"page_size": "2MiB"}),
    # 192 KiB against blocks of 256 KiB: most blocks lie on two pages, most pages under two blocks.
    Case("straddling-pages-preempting",
         settings={"page_size": "192KiB", "capacity": "20MiB"}, preempts=True),
    Case("preempting-1MiB", engine={"enable_prefix_caching": False},
         settings={"page_size": "1MiB", "capacity": "20MiB"}, preempts=True),
    Case("chunked-prefill", engine={"max_num_batched_tokens": 128},
         settings={"page_size": "512KiB"}),
    Case("layers-preempting", settings={"layout": "layer", "capacity": "20MiB"}, preempts=True),
    Case("sliding-window", model="gemma", engine={"enable_prefix_caching": False}),
    Case("sliding-window-preempting", model="gemma",
         settings={"page_size": "192KiB", "capacity": "10MiB"}, preempts=True),
    Case("two-tensor-parallel-ranks", engine={"tensor_parallel_size": 2}, in_process=False,
         settings={"capacity": "20MiB"}, preempts=True, exact=False),
    Case("two-pipeline-stages", engine={"pipeline_parallel_size": 2}, in_process=False,
         settings={"capacity": "20MiB"}, preempts=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_stock_engine(
    case: Case, models: Models, patched: EngineHost, references: References, tmp_path: Path
) -> None:
    batches = LLAMA_BATCHES if case.model == "llama" else GEMMA_BATCHES
    job = Job(
        getattr(models, case.model),
        FEW_BATCHES if case.preempts else batches,
        case.engine,
        elastic_env(tmp_path, **case.settings),
        in_process=case.in_process,
    )
    if case.preempts:
        job.max_tokens = LONG_ANSWER
    with LedgerWatch(ledger_path(tmp_path)) as watch:
        result = patched.run(job).require()
    _check_was_elastic(result, watch)
    if not case.engine.get("enable_prefix_caching", True):
        # A prefix cache may end up in every page there is; without one freed pages go back.
        assert result.metrics["vllm:kvcached_decommitted_pages"] > 0
    check_account(watch)
    assert (result.metrics["vllm:num_preemptions"] > 0) == case.preempts
    expected = references[f"{case.model}-long" if case.preempts else case.model]
    _check_same(job, expected, result, exact=case.exact)


def _check_was_elastic(result: Result, watch: LedgerWatch) -> None:
    assert result.metrics["vllm:kvcached_committed_pages"] > 0
    assert watch.peak_committed() > 0
    ledger = Ledger(watch.path)
    # Its processes end one after the other.
    wait_until(lambda: not read(ledger).leased, 15, "the engine that ended is out of the ledger")


def _check_same(job: Job, expected: Result, result: Result, *, exact: bool) -> None:
    compared = exactly = 0
    prompts = [prompt for batch in job.batches for prompt in batch]
    answers = zip(prompts, expected.tokens, expected.logprobs, strict=True)
    for i, (prompt, tokens, scores) in enumerate(answers):
        if exact and same_bits(len(prompt) + len(tokens)):
            assert result.tokens[i] == tokens, f"prompt {i}"
            assert result.logprobs[i] == scores, f"prompt {i}"
            exactly += 1
            compared += len(tokens)
            continue
        for k, (token, (best, second)) in enumerate(zip(tokens, scores, strict=True)):
            if best - second < TIE:
                break  # Either token is right, and what follows depends on it.
            assert result.tokens[i][k] == token, f"prompt {i}, token {k}"
            assert result.logprobs[i][k][0] == pytest.approx(best, abs=TIE)
            compared += 1
    assert compared >= 0.95 * sum(map(len, expected.tokens)), "too many ties to prove anything"
    assert exactly or not exact
