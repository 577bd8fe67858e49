# SPDX-License-Identifier: Apache-2.0
"""A real engine whose every call to the host's memory fails once, one after the other, as it wakes.

Run as a script with a model's folder and one for its files; prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    os.environ.update(
        ENABLE_KVCACHED="true",
        KVCACHED_LEDGER_DIR=str(folder / "ledger"),
        KVCACHED_WEIGHTS_DIR=str(folder / "weights"),
        KVCACHED_NAME="engine",
        KVCACHED_CAPACITY="48MiB",
        KVCACHED_PAGE_SIZE="256KiB",
        KVCACHED_PARKED="0",
        KVCACHED_PARKED_DECAY_MS="0",
        KVCACHED_COMMIT_AHEAD="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    import vllm

    import kvcached_core.vllm as glue
    from kvcached_core import Ledger
    from kvcached_core._core import FaultyBackend

    backends: list[FaultyBackend] = []

    def open_faulty(*args: Any) -> FaultyBackend:
        backends.append(FaultyBackend(real(*args)))
        return backends[-1]

    real, glue.open_backend = glue.open_backend, open_faulty  # type: ignore[assignment]
    llm = vllm.LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=64 << 20,
        enable_sleep_mode=True,
    )
    prompts = [vllm.TokensPrompt(prompt_token_ids=list(range(10 + i, 210 + i))) for i in range(4)]

    def ask() -> list[list[int]]:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        return [list(a.outputs[0].token_ids) for a in llm.generate(prompts, sampling)]

    ledger = Ledger(folder / "ledger" / "host-0.ledger")

    def state() -> list[tuple[str, int, int, int]]:
        return [(m.name, m.leased, m.committed, m.static_bytes) for m in ledger.members()]

    expected = ask()
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    weights = backends[-1]
    failures, right = 0, True
    for level in (1, 2):
        for nth in range(1, 60):
            llm.sleep(level=level)
            asleep = state()
            weights.fail(nth)
            try:
                llm.wake_up()
            except Exception as error:
                assert "injected" in str(error), error
                weights.clear()
                failures += 1
                assert executor.is_sleeping and state() == asleep, (nth, state(), asleep)
                llm.wake_up()
            else:
                break
            finally:
                weights.clear()
            right = right and ask() == expected
    print(json.dumps({"failures": failures, "right": right, "backends": len(backends)}))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
