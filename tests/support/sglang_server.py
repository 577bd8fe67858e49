# SPDX-License-Identifier: Apache-2.0
"""SGLang servers, started as a user does or as forks of a process that has imported SGLang.

The stock and the patched engine and what both need besides are folders, chosen by PYTHONPATH:
`SGLANG_STOCK`, `SGLANG_PATCHED` and `SGLANG_DEPS`.
"""

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

from .engines import Flavor, engine_folder
from .prompts import Prompt
from .server import HttpServer, Process, free_port

# float32 and one thread: see `engines.ENVIRONMENT`. The checks are SGLang's own: after every step
# it counts its tokens, and looks for pages that are free and in use.
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    # Else every look at /health generates a token, and takes memory for it.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ARGS = ("--device=cpu", "--dtype=float32", "--enable-metrics", "--log-level-http=warning")
"""Of every server."""


def sglang_folder(name: Flavor | str) -> Path | None:
    """`stock`, `patched` or `deps`; None if the environment names none."""
    value = os.environ.get(f"SGLANG_{name.upper()}", "")
    return Path(value) if value else None


def sglang_environment(flavor: Flavor, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of an SGLang process: this one's, without vLLM and any setting."""
    dropped = ("KVCACHED_", "ENABLE_KVCACHED", "SGLANG_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    ours = [sglang_folder(flavor), sglang_folder("deps")]
    others = [engine_folder("stock"), engine_folder("patched"), sglang_folder("stock")]
    others += [sglang_folder("patched"), sglang_folder("deps")]
    rest = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p) not in others]
    env["PYTHONPATH"] = os.pathsep.join([str(folder) for folder in ours if folder] + rest)
    return env | ENVIRONMENT | dict(changes or {})


class Forked:
    """A server that an `SglangHost` forked, as `subprocess.Popen` would show it."""

    def __init__(self, host: SglangHost, pid: int) -> None:
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
                raise subprocess.TimeoutExpired("sglang", timeout)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 15)


class SglangHost:
    """A process that has imported SGLang, of which servers are forks.

    Four fifths of a start are imports, made by each of a server's processes anew.
    """

    def __init__(self, flavor: Flavor, folder: Path) -> None:
        self.flavor = flavor
        self._folder = folder
        self._lock = threading.Lock()
        script = Path(__file__).with_name("sglang_host.py")
        with (folder / "host.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                env=sglang_environment(flavor),
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
            raise RuntimeError(f"SGLang host died: {(self._folder / 'host.log').read_text()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Ends the process; its servers were stopped before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


class SglangServer(HttpServer):
    """An SGLang server; a fork of `host` if there is one, else started as a user does."""

    module = "sglang.launch_server"

    def __init__(
        self,
        name: str,
        model: Path,
        folder: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        flavor: Flavor = "patched",
        *,
        host: SglangHost | None = None,
    ) -> None:
        assert host is None or host.flavor == flavor
        # Else it looks for a free one itself, long before it listens there; replicas must.
        replicas = any(arg.startswith("--dp-size") for arg in args)
        ports = () if replicas else (f"--nccl-port={free_port()}",)
        env = sglang_environment(flavor, env)
        super().__init__(name, model, folder, (*ARGS, *ports, *args), env)
        self._host = host

    def arguments(self) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        return ["--model-path", str(self.model), *where, *self._args]

    def _launch(self) -> Process:
        if self._host is None:
            return super()._launch()
        return self._host.fork(self.arguments(), self._env, self.log)

    def stop(self, timeout_s: float = 30.0) -> int:
        """Ends it at once: told to end, it drains for seconds, and kills its processes then."""
        if self.code is None and self._process is not None:
            self.kill()
        return super().stop(timeout_s)

    def request(self, prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
        sampling = {"max_new_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        return "/generate", {"input_ids": prompt, "sampling_params": sampling}

    def answered(self, answer: dict[str, Any]) -> list[int]:
        return list(answer["output_ids"])
