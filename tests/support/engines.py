# SPDX-License-Identifier: Apache-2.0
"""The two engines under test, stock and patched, and jobs for them.

Both are folders that lie over one environment and are chosen by PYTHONPATH: `ENGINE_STOCK` and
`ENGINE_PATCHED`. Without `ENGINE_STOCK` the environment's own vLLM is the stock one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .prompts import Prompt

Flavor = Literal["stock", "patched"]

# float32 and one thread: then a token's logits are the same bits whatever else is in the batch,
# so results can be compared exactly (see `same_bits`). With two threads they differ by about 1e-5.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The random sampler, which greedy decoding does not use, would be compiled for 15 s.
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 512 << 20,
}


# What the CPU attention of vLLM keeps for a token of the tiny models, whose heads have 32 numbers:
# query, key, value, output, and 16 scores.
_TILE_TOKEN_BYTES = (4 * 32 + 16) * 4


def same_bits(context: int) -> bool:
    """Whether logits after so many tokens are the same bits whatever else is in the batch.

    Attention is computed in tiles that fill half of the second-level cache. Of a longer context
    there are several, and where one ends depends on the batch.
    """
    import torch  # most who import this module do without

    cache: int = torch.cpu.get_capabilities()["l2_cache_size"]
    return context * _TILE_TOKEN_BYTES <= cache // 2


def engine_folder(flavor: Flavor) -> Path | None:
    """The folder of an engine, or None if the environment names none."""
    value = os.environ.get(f"ENGINE_{flavor.upper()}", "")
    return Path(value) if value else None


def engine_environment(
    flavor: Flavor, changes: Mapping[str, str] | None = None, *, fixed: bool = True
) -> dict[str, str]:
    """The environment of an engine process: this one's, without any setting of kvcached's.

    Args:
        flavor: which engine.
        changes: variables on top.
        fixed: whether to set what makes results comparable to the last bit.
    """
    dropped = ("KVCACHED_", "ENABLE_KVCACHED", "VLLM_CPU_KVCACHE_SPACE")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    others = (engine_folder("stock"), engine_folder("patched"))
    path = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p) not in others]
    folder = engine_folder(flavor)
    if folder is not None:
        path.insert(0, str(folder))
    env["PYTHONPATH"] = os.pathsep.join(path)
    if fixed:
        env.update(ENVIRONMENT)
    env.update(changes or {})
    return env


@dataclass
class Job:
    """One engine, started with `engine` and `env`, answering the batches in turn."""

    model: Path
    batches: list[list[Prompt]]
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    max_tokens: int = 32
    in_process: bool = True
    """Engine and worker in the job's own process; the only way to start in two seconds."""


@dataclass
class Result:
    """What a job gave, or why it failed."""

    code: int
    log: str
    vllm: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[list[float]]] = field(default_factory=list)
    """Of every prompt and position, the two best."""
    metrics: dict[str, float] = field(default_factory=dict)
    start_s: float = 0.0
    generate_s: float = 0.0

    def require(self) -> Result:
        """This result, if the engine did not fail."""
        assert self.code == 0, f"engine ended with {self.code}:\n{self.log[-6000:]}"
        return self


class EngineHost:
    """One process with vLLM imported, running jobs one after the other."""

    def __init__(self, flavor: Flavor, folder: Path) -> None:
        self.flavor = flavor
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._stderr = (folder / "host.log").open("ab")
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._queue = ThreadPoolExecutor(max_workers=1)

    def submit(self, job: Job) -> Future[Result]:
        """Queues a job; jobs of different hosts run at the same time."""
        return self._queue.submit(self._run, job)

    def run(self, job: Job) -> Result:
        """Runs a job and waits for its result, good or bad."""
        return self.submit(job).result()

    def _start(self) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("engine_host.py")
        return subprocess.Popen(
            [sys.executable, str(script)],
            env=engine_environment(self.flavor),
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def _run(self, job: Job) -> Result:
        with self._lock:
            if self._process is None:
                self._process = self._start()
        self._count += 1
        log = self._folder / f"job{self._count}.log"
        answer = self._folder / f"job{self._count}.json"
        order = asdict(job) | {"log": str(log), "result": str(answer), "model": str(job.model)}
        order["engine"] = ENGINE_ARGS | {"disable_log_stats": False} | job.engine
        order["env"] = job.env | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if job.in_process else "1",
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"engine host died: {(self._folder / 'host.log').read_text()}")
        code = json.loads(line)["code"]
        text = log.read_text(errors="replace") if log.exists() else ""
        if code != 0:
            return Result(code, text)
        return Result(code, text, **json.loads(answer.read_text()))

    def close(self) -> None:
        """Ends the process, once its running job is done."""
        self._queue.shutdown(wait=True, cancel_futures=True)
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)
        self._stderr.close()
