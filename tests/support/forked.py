# SPDX-License-Identifier: Apache-2.0
"""Engine servers as forks of a process that has imported the engine; see `fork_host`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Forked:
    """A server that a `ServerHost` forked, as `subprocess.Popen` would show it."""

    def __init__(self, host: ServerHost, pid: int) -> None:
        self.pid = pid
        self._host = host
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._host.ask({"poll": self.pid})["code"]
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise subprocess.TimeoutExpired("server", timeout)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 15)


class ServerHost:
    """A process that has imported an engine, of which servers are forks.

    Four fifths of a start are imports, made by each of a server's processes anew.

    Args:
        engine: "vllm" or "sglang".
        env: its whole environment, with what must be set before an import.
        folder: for its log.
    """

    def __init__(self, engine: str, env: Mapping[str, str], folder: Path) -> None:
        self._log = folder / "host.log"
        self._lock = threading.Lock()
        script = Path(__file__).with_name("fork_host.py")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), engine],
                env=dict(env),
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )

    def fork(self, args: Sequence[str], env: Mapping[str, str], log: Path) -> Forked:
        """A server with these arguments and this whole environment."""
        job = {"args": list(args), "env": dict(env), "log": str(log), "folder": str(log.parent)}
        return Forked(self, self.ask(job)["pid"])

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps(question), file=self._process.stdin)
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"server host died: {self._log.read_text()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Ends the process; its servers were stopped before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
