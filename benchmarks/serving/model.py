# SPDX-License-Identifier: Apache-2.0
"""Models with the shape of real ones, random weights, and a word for every token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.tokens_and_throughput import LLAMA_8B
from tests.support.tiny_model import LLAMA, SPECIAL_TOKENS, TinySpec, make_tiny_model

LLAMA_1B = TinySpec(
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    hidden=2048,
    intermediate=8192,
    vocab=128256,
    max_len=16640,
)
SHAPES = {"8b": replace(LLAMA_8B, max_len=LLAMA_1B.max_len), "1b": LLAMA_1B, "tiny": LLAMA}


def make_model(folder: Path, shape: str) -> Path:
    """The model's directory, made once: one path for all servers, so they share compiled code."""
    path = folder / shape
    if (path / "ready").exists():
        return path
    spec = SHAPES[shape]
    make_tiny_model(path, spec, weights=False)
    words = {f"t{i}": i for i in range(spec.vocab)}
    special = {word: f"t{i}" for i, word in enumerate(SPECIAL_TOKENS)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config = {key: special.get(str(value), value) for key, value in config.items()}
    config_path.write_text(json.dumps(config))
    (path / "ready").touch()
    return path
