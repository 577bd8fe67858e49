# SPDX-License-Identifier: Apache-2.0
"""Starts servers as forks of a process that has imported their engine already.

It is run as a script with the engine's name. One JSON question a line on stdin, one JSON answer a
line on stdout: arguments and environment of a server for its process id, or a process id for its
exit status.

A fork runs what `python -m sglang.launch_server`, say, runs, but that the processes it starts are
forks as well, and need not import everything anew.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from forking import fork_always  # this folder is where a script looks

# Of every engine the module that is its server, and what a server imports, the processes it starts
# and the tests' models among it.
ENGINES = {
    "sglang": (
        "sglang.launch_server",
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.data_parallel_controller",
        "sglang.srt.managers.detokenizer_manager",
        "sglang.srt.managers.scheduler",
        "sglang.srt.models.registry",
    ),
    "vllm": (
        "vllm.entrypoints.openai.api_server",
        "vllm.entrypoints.openai.api_server",
        "vllm.model_executor.models.llama",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
    ),
}


def _code_of(status: object) -> int:
    """What the interpreter makes of `SystemExit`."""
    if status is None:
        return 0
    if isinstance(status, int):
        return status
    print(status, file=sys.stderr)
    return 1


def _become(module: str, job: dict[str, Any]) -> None:
    """Never returns. A session of its own, as a server that is started otherwise has."""
    os.setsid()
    os.chdir(job["folder"])
    with Path(os.devnull).open() as nothing, Path(job["log"]).open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(job["env"])
    random.seed()
    sys.argv = [module, *job["args"]]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = _code_of(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    del sys.path[0]  # This folder: the engine must not find the tests' modules.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server, *imports = ENGINES[sys.argv[1]]
    for name in imports:
        importlib.import_module(name)
    fork_always()
    gc.freeze()

    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            answer = {"code": _poll(job["poll"])}
        else:
            pid = os.fork()
            if pid == 0:
                _become(server, job)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
