# SPDX-License-Identifier: Apache-2.0
"""SGLang as tokens_and_throughput.py runs vLLM: its tokens, offline throughput and memory.

    ENGINE_STOCK=... ENGINE_PATCHED=... python benchmarks/gpu/run_all.py \
        --script sglang_engine.py --out build/sglang.jsonl stock on stock on

With `--model` it is one of hybrid_models.py, with a prefix cache:

    ... run_all.py --script sglang_engine.py --out build/hybrids.jsonl stock on stock on \
        -- --model qwen3-next --cells tokens 64x2048x256 --repeats 1

With `--tiny` it runs on the CPU, to try it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import hybrid_models
from benchmarks.gpu.tokens_and_throughput import LLAMA_8B, DeviceMemory, greedy_tokens, throughput
from tests.support.prompts import equal_prompts
from tests.support.tiny_model import LLAMA, make_tiny_model

MLA_2B = replace(LLAMA_8B, arch="mla", layers=24, heads=16, hidden=2048, intermediate=10944)
WEIGHTS = "benchmarks.gpu.weights.load_use_attention"


def members() -> list[dict[str, Any]]:
    """What the ledger says, for an elastic engine."""
    folder = os.environ.get("KVCACHED_LEDGER_DIR")
    if not folder or not Path(folder).is_dir():
        return []
    from kvcached_core import Ledger

    return [
        {"leased": m.leased, "committed": m.committed, "parked": m.parked, "static": m.static_bytes}
        | {"counters": dict(m.counters)}
        for path in Path(folder).glob("*.ledger")
        for m in Ledger(path).members()
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    memory = DeviceMemory()
    report: dict[str, Any] = {"label": args.label, "memory_mib": {"before": memory.used() >> 20}}
    spec = LLAMA if args.tiny else MLA_2B if args.mla else LLAMA_8B
    with tempfile.TemporaryDirectory() as folder:
        import sglang

        if args.model:
            model, spec = hybrid_models.make(folder, args.model)
        else:
            model = make_tiny_model(folder, spec, weights=False)
        begin = time.perf_counter()
        settings: dict[str, Any] = {
            "model_path": str(model),
            "load_format": "dummy",
            "dtype": "float32" if args.tiny else "bfloat16",
            "skip_tokenizer_init": True,
            "context_length": spec.max_len,
            "disable_radix_cache": args.model is None,
            "custom_weight_loader": [WEIGHTS],
        }
        if args.tiny:
            settings |= {"device": "cpu", "max_total_tokens": 8192}
        else:
            settings |= {"attention_backend": "triton", "sampling_backend": "pytorch"}
        engine = sglang.Engine(**settings | json.loads(args.engine))
        report["start_s"] = round(time.perf_counter() - begin, 1)
    import torch

    engine.update_weights_from_tensor([("none", torch.zeros(1))], load_format=WEIGHTS)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        return [list(answer["output_ids"]) for answer in answers]

    generate(equal_prompts(16, min(512, spec.max_len // 4), 1), 16)
    memory.take_peak()
    report["memory_mib"]["idle"] = memory.used() >> 20
    report["cells"] = {}
    for cell in args.cells:
        if cell == "tokens":
            answers = greedy_tokens(generate, spec.vocab, args.token_prompts, args.token_outputs)
            report["tokens"] = answers
            report["tokens_sha256"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
            report["distinct_tokens"] = len({token for answer in answers for token in answer})
        else:
            report["cells"][cell] = throughput(generate, cell, spec.vocab, args.repeats)
            report["cells"][cell]["peak_mib"] = memory.take_peak() >> 20
    time.sleep(args.settle)
    report["memory_mib"]["after_load"] = memory.used() >> 20
    report["sglang"], report["kvcached"] = sglang.__file__, members()
    engine.shutdown()
    time.sleep(1)
    report["memory_mib"]["after_exit"] = memory.used() >> 20
    memory.stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="One SGLang engine's tokens and throughput.")
    parser.add_argument("--label", default="", help="copied into the report")
    parser.add_argument("--cells", nargs="+", default=["tokens", "256x512x256", "8x512x256"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--token-prompts", type=int, default=24)
    parser.add_argument("--token-outputs", type=int, default=48)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds idle before the end")
    parser.add_argument("--engine", default="{}", help="further arguments of the engine, as JSON")
    parser.add_argument("--mla", action="store_true", help="latent attention, 2B parameters")
    parser.add_argument("--model", choices=hybrid_models.CONFIGS, help="instead of a Llama 8B")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    print("REPORT " + json.dumps(run(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
