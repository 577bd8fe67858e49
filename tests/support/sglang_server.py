# SPDX-License-Identifier: Apache-2.0
"""SGLang servers, started as a user does or as forks of a process that has imported SGLang.

The stock and the patched engine and what both need besides are folders, chosen by PYTHONPATH:
`SGLANG_STOCK`, `SGLANG_PATCHED` and `SGLANG_DEPS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engines import Flavor, engine_folder
from .forked import ServerHost
from .prompts import Prompt
from .server import HttpServer, free_port

# float32 and one thread: see `engines.ENVIRONMENT`.
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # Else every look at /health generates a token, and takes memory for it.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    "OMP_NUM_THREADS": "1",
    # Else a server may compile a norm when it starts, for half a minute. It is read when torch is
    # imported, so it must be in the environment of what servers are forks of.
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# SGLang's own: after every step it counts its tokens, and looks for pages that are free and in use.
# That takes longer than a tiny model's step, and the stock engine is not what is tested.
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
ARGS = ("--device=cpu", "--dtype=float32", "--enable-metrics", "--log-level-http=warning")
"""Of every server."""
QUIET = "--sleep-on-idle"


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
    checks = CHECKS if flavor == "patched" else {}
    return env | ENVIRONMENT | checks | dict(changes or {})


class SglangHost(ServerHost):
    """Servers of a process that has imported SGLang, with these changes to its environment."""

    def __init__(
        self, flavor: Flavor, folder: Path, changes: Mapping[str, str] | None = None
    ) -> None:
        super().__init__("sglang", sglang_environment(flavor, changes), folder)
        self.flavor = flavor


class SglangServer(HttpServer):
    """An SGLang server; a fork of `host` if there is one, else started as a user does.

    Idle, the latter polls, and takes a core from whoever is busy; a fork sleeps unless told not to.
    """

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
        quiet: bool | None = None,
    ) -> None:
        assert host is None or host.flavor == flavor
        # Else it looks for a free one itself, long before it listens there; replicas must.
        replicas = any(arg.startswith("--dp-size") for arg in args)
        ports = () if replicas else (f"--nccl-port={free_port()}",)
        env = sglang_environment(flavor, env)
        if host is not None and quiet is not False:
            args = (*args, QUIET)
        super().__init__(name, model, folder, (*ARGS, *ports, *args), env, host)

    def arguments(self) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        return ["--model-path", str(self.model), *where, *self._args]

    def stop(self, timeout_s: float = 30.0) -> int:
        """Ends it at once: told to end, it drains for seconds, and kills its processes then."""
        if self.code is None and self._process is not None:
            self.kill()
        return super().stop(timeout_s)

    def request(self, prompt: Prompt | list[Prompt], max_tokens: int) -> tuple[str, dict[str, Any]]:
        sampling = {"max_new_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        return "/generate", {"input_ids": prompt, "sampling_params": sampling}

    def answered(self, answer: dict[str, Any]) -> list[int]:
        return list(answer["output_ids"])

    def answers(self, whole: Any) -> list[dict[str, Any]]:
        return list(whole)
