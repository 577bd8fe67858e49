# SPDX-License-Identifier: Apache-2.0
"""One engine, one process: its tokens, its offline throughput and the memory it held.

The model has the shape of Llama 3.1 8B and random weights. Run it through `run_all.py`, which
chooses the engine and the settings of each run by environment variables.

    python benchmarks/gpu/tokens_and_throughput.py --cells tokens 256x512x256 8x512x256
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.kernels import reduction_kernels
from benchmarks.gpu.weights import use_attention
from tests.support.prompts import tokens
from tests.support.tiny_model import LLAMA, TinySpec, make_tiny_model

LLAMA_8B = TinySpec(
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=4096,
    intermediate=14336,
    vocab=128256,
    max_len=8192,
)


Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of tokens to their answers, greedily."""


class DeviceMemory:
    """Samples the bytes that anybody uses on the GPU that engines see first; else nothing."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        try:
            import pynvml

            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
            self._read = lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            self._read()
        except Exception as error:
            print(f"device memory is not sampled: {error}", file=sys.stderr)
            self._read = lambda: 0
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._read())

    def used(self) -> int:
        """Bytes in use now."""
        return self._read()

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = max(self.peak, self._read()), 0
        return peak

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _sampling(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def _generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    from vllm import TokensPrompt

    answers = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        _sampling(max_tokens),
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


def throughput(generate: Generate, cell: str, vocab: int, repeats: int) -> dict[str, Any]:
    """Output tokens a second of one cell, `prompts x tokens in x tokens out`, each repeat."""
    count, length, output = (int(part) for part in cell.split("x"))
    rng = random.Random(count)
    rates = []
    for _ in range(repeats):
        prompts = [tokens(rng, length, vocab) for _ in range(count)]
        begin = time.perf_counter()
        generate(prompts, output)
        rates.append(count * output / (time.perf_counter() - begin))
    return {"out_tok_s": [round(rate, 1) for rate in rates], "best": round(max(rates), 1)}


def greedy_tokens(generate: Generate, vocab: int, count: int, output: int) -> list[list[int]]:
    """Answers to prompts sent one by one, since a batch's composition alone changes some."""
    rng = random.Random(7)
    prompts = [tokens(rng, rng.randrange(1, 1500), vocab) for _ in range(count)]
    return [generate([prompt], output)[0] for prompt in prompts]


def run(args: argparse.Namespace) -> dict[str, Any]:
    memory = DeviceMemory()
    report: dict[str, Any] = {"label": args.label, "memory_mib": {"before": memory.used() >> 20}}
    spec = LLAMA if args.tiny else LLAMA_8B
    with tempfile.TemporaryDirectory() as folder:
        import vllm

        model = make_tiny_model(folder, spec, weights=False)
        begin = time.perf_counter()
        llm = vllm.LLM(
            model=str(model),
            load_format="dummy",
            dtype="float32" if args.tiny else "bfloat16",
            skip_tokenizer_init=True,
            max_model_len=spec.max_len,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **json.loads(args.engine),
        )
        report["start_s"] = round(time.perf_counter() - begin, 1)
    report["vllm"] = vllm.__file__
    report["parameters"] = sum(llm.apply_model(use_attention))
    if not args.tiny and report["parameters"] < 8e9:
        # The CPU build packs its weights away, and the answers would be those of dummy weights.
        raise RuntimeError(f"only {report['parameters']} weights were set")
    generate = partial(_generate, llm)
    generate([tokens(random.Random(1), 512, spec.vocab)] * 16, 16)
    memory.take_peak()
    report["memory_mib"]["idle"] = memory.used() >> 20
    report["reduction_kernels"] = llm.apply_model(reduction_kernels)[0]
    report["cells"] = {}
    for cell in args.cells:
        if cell == "tokens":
            answers = greedy_tokens(generate, spec.vocab, args.token_prompts, args.token_outputs)
            text = json.dumps(answers)
            report["tokens"] = answers
            report["tokens_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            report["distinct_tokens"] = len({token for answer in answers for token in answer})
        else:
            report["cells"][cell] = throughput(generate, cell, spec.vocab, args.repeats)
            report["cells"][cell]["peak_mib"] = memory.take_peak() >> 20
    time.sleep(args.settle)
    report["memory_mib"]["after_load"] = memory.used() >> 20
    report["kvcached"] = {
        metric.name.removeprefix("vllm:kvcached_"): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:kvcached_") and hasattr(metric, "value")
    }
    llm.llm_engine.engine_core.shutdown()
    time.sleep(1)
    report["memory_mib"]["after_exit"] = memory.used() >> 20
    memory.stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="One engine's tokens, throughput and memory.")
    parser.add_argument("--label", default="", help="copied into the report")
    parser.add_argument(
        "--cells",
        nargs="+",
        default=["tokens", "256x512x256", "8x512x256"],
        help="'tokens', or PROMPTSxINxOUT",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--token-prompts", type=int, default=24)
    parser.add_argument("--token-outputs", type=int, default=48)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds idle before the end")
    parser.add_argument("--engine", default="{}", help="further arguments of vllm.LLM, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    args = parser.parse_args()
    # Lets a function be sent to the workers, which is how the weights are set.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    print("REPORT " + json.dumps(run(args)), flush=True)


if __name__ == "__main__":
    main()
