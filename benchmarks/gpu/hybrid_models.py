# SPDX-License-Identifier: Apache-2.0
"""Model directories without weights, of shapes that keep more than one kind of cache.

Few layers, each as large as in the model it is named after.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.tiny_model import TinySpec, make_tiny_model

_BASE = TinySpec(vocab=32000, max_len=32768)

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": _BASE.max_len,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": _BASE.vocab,
}
_SLIDES = [(i + 1) % 4 != 0 for i in range(16)]

CONFIGS: dict[str, dict[str, Any]] = {
    # Windows of 4096 tokens in three layers of four.
    "command-r7b": {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": len(_SLIDES),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "layer_norm_eps": 1e-5,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in _SLIDES],
        "logit_scale": 0.25,
        "rope_theta": 50000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "use_qk_norm": False,
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [int(s) for s in _SLIDES],
    },
    # Linear attention in three layers of four: 2 MiB of state in each.
    "qwen3-next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
        "rms_norm_eps": 1e-6,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    # Mamba2 and attention side by side in every layer.
    "falcon-h1": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000000000.0,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 64,
        "mamba_d_ssm": 3072,
        "mamba_d_state": 256,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 48,
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": False,
        "mamba_rms_norm": False,
        "projectors_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    # Attention and short convolutions; also runs on a CPU, by Triton's interpreter.
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "block_auto_adjust_ff_dim": False,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["full_attention" if i % 3 == 2 else "conv" for i in range(16)],
        "norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}


def make(folder: Path | str, name: str) -> tuple[Path, TinySpec]:
    """Writes the directory of ``CONFIGS[name]``; returns it, and what is common to them all."""
    path = make_tiny_model(folder, replace(_BASE, vocab=2048), weights=False)
    (path / "config.json").write_text(json.dumps(_COMMON | CONFIGS[name], indent=1) + "\n")
    return path, _BASE
