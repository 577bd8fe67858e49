# SPDX-License-Identifier: Apache-2.0
"""Runs engine jobs in forks of a process that has imported vLLM already.

Importing takes far longer than building a tiny model's engine, and an engine leaves too much
state behind to build two in one process. So the host imports once, and forks for each job. It is
run as a script: one JSON job a line on stdin, one JSON status a line on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from forking import fork_always  # this folder is where a script looks


def _metrics(llm: Any) -> dict[str, float]:
    """Counters and gauges of the engine, summed over their labels."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if value is not None:
            totals[metric.name] = totals.get(metric.name, 0.0) + value
    return totals


def _generate(llm: Any, job: dict[str, Any]) -> tuple[list[list[int]], list[list[list[float]]]]:
    """Token ids, and the two best log probabilities of each position."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=2
    )
    ids, scores = [], []
    for batch in job["batches"]:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in batch]
        for answer in llm.generate(prompts, sampling, use_tqdm=False):
            output = answer.outputs[0]
            ids.append(list(output.token_ids))
            best = [sorted(s.logprob for s in step.values())[-2:] for step in output.logprobs]
            scores.append([pair[::-1] for pair in best])
    return ids, scores


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Builds the engine, generates, and shuts it down."""
    import vllm

    begin = time.monotonic()
    llm = vllm.LLM(model=job["model"], **job["engine"])
    ready = time.monotonic()
    ids, scores = _generate(llm, job)
    done = time.monotonic()
    metrics = _metrics(llm)
    llm.llm_engine.engine_core.shutdown()
    return {
        "vllm": vllm.__file__,
        "tokens": ids,
        "logprobs": scores,
        "metrics": metrics,
        "start_s": ready - begin,
        "generate_s": done - ready,
    }


def _child(job: dict[str, Any]) -> None:
    """Never returns. A group of its own lets the host end whatever the engine started."""
    os.setpgid(0, 0)
    with Path(job["log"]).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 1
    try:
        os.environ.update(job["env"])
        Path(job["result"]).write_text(json.dumps(run_job(job)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    del sys.path[0]  # This folder: the engine must not find the tests' modules.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # What an engine imports only when it is built, imported here once for all.
    import vllm.model_executor.models.gemma3
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    fork_always()

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(job)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
