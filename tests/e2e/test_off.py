# SPDX-License-Identifier: Apache-2.0
"""With the feature not asked for, the patched engine is the stock engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import LLAMA_BATCHES, Models, References
from tests.support.elastic import elastic_env
from tests.support.engines import EngineHost, Job, engine_folder

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("switch", [None, "", "false"])
def test_off_touches_nothing(
    switch: str | None,
    models: Models,
    patched: EngineHost,
    references: References,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "ledger"
    env = elastic_env(folder)
    del env["ENABLE_KVCACHED"]
    if switch is not None:
        env["ENABLE_KVCACHED"] = switch
    # All that differs is how off is said, so one batch will do but for the usual way.
    batches = LLAMA_BATCHES if switch is None else LLAMA_BATCHES[:1]
    result = patched.run(Job(models.llama, batches, env=env)).require()
    assert result.vllm.startswith(str(engine_folder("patched")))
    assert not folder.exists()
    assert not [name for name in result.metrics if "kvcached" in name]
    expected = references["llama"]
    assert result.tokens == expected.tokens[: len(result.tokens)]
    assert result.logprobs == expected.logprobs[: len(result.tokens)]
