# SPDX-License-Identifier: Apache-2.0
"""Starts SGLang servers as forks of a process that has imported SGLang already.

It is run as a script. One JSON question a line on stdin, one JSON answer a line on stdout:
arguments and environment of a server for its process id, or a process id for its exit status.

A fork runs what `python -m sglang.launch_server` runs, but that the processes it starts are forks
as well, and need not import everything anew.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any


def _code_of(status: object) -> int:
    """What the interpreter makes of `SystemExit`."""
    if status is None:
        return 0
    if isinstance(status, int):
        return status
    print(status, file=sys.stderr)
    return 1


def _become(job: dict[str, Any]) -> None:
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
    sys.argv = ["sglang.launch_server", *job["args"]]
    code = 1
    try:
        runpy.run_module("sglang.launch_server", run_name="__main__")
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
    # What a server imports, its scheduler and all models among it.
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.data_parallel_controller
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401

    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None  # type: ignore[assignment]
    gc.freeze()

    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            answer = {"code": _poll(job["poll"])}
        else:
            pid = os.fork()
            if pid == 0:
                _become(job)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
