# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that a real engine can load, made in seconds without a network.

Random weights are easy; random weights whose output depends on the KV cache are not. With the
usual initialisation every attention head averages its whole context, the average is close to zero,
and the model repeats two tokens whatever the cache holds, so a test comparing tokens could not
fail. Here queries and keys are scaled up until the softmax picks a few tokens out of the context,
and the output projection until what it picked decides the next token.

    python -m tests.support.tiny_model /tmp/tiny --arch gemma3
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TinySpec:
    """Shape of a tiny model. In float32 one token takes `kv_bytes_per_token` of KV cache."""

    arch: str = "llama"
    """Or "gemma3": five sliding-window layers, then one full layer; or "cohere2": three, then one,
    which SGLang keeps in a pool of its own; or "lfm2": every other layer is a short convolution,
    which has a state; or "mla": latent attention as in DeepSeek V2, no experts, no weights."""
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 256
    intermediate: int = 512
    vocab: int = 2048
    max_len: int = 4096
    sliding_window: int = 256
    conv_kernel: int = 4
    seed: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        layers = self.layers // 2 if self.arch == "lfm2" else self.layers
        return layers * 2 * self.kv_heads * self.head_dim * 4

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's states over all layers."""
        layers = self.layers // 2 if self.arch == "lfm2" else 0
        return layers * self.hidden * (self.conv_kernel - 1) * 4


LLAMA = TinySpec()
GEMMA3 = TinySpec(arch="gemma3", layers=6, kv_heads=1, heads=4)
COHERE2 = TinySpec(arch="cohere2", sliding_window=64)
LFM2 = TinySpec(arch="lfm2", layers=6, kv_heads=1, heads=4)
SPECS = {spec.arch: spec for spec in (LLAMA, GEMMA3, COHERE2, LFM2)}


def _config(spec: TinySpec) -> dict[str, Any]:
    common: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "head_dim": spec.head_dim,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.max_len,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": spec.vocab,
    }
    if spec.arch == "llama":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }
    if spec.arch == "gemma3":
        return common | {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": [
                "full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
                for i in range(spec.layers)
            ],
            "query_pre_attn_scalar": spec.head_dim,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": spec.sliding_window,
            "tie_word_embeddings": True,
        }
    if spec.arch == "mla":
        return common | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "first_k_dense_replace": spec.layers,
            "head_dim": 64,
            "hidden_act": "silu",
            "kv_lora_rank": 512,
            "moe_layer_freq": 1,
            "moe_intermediate_size": spec.intermediate,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "num_key_value_heads": spec.heads,
            "q_lora_rank": None,
            "qk_nope_head_dim": spec.head_dim,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": spec.max_len // 2,
            },
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "v_head_dim": spec.head_dim,
        }
    if spec.arch == "cohere2":
        slides = [(i + 1) % 4 != 0 for i in range(spec.layers)]
        return common | {
            "architectures": ["Cohere2ForCausalLM"],
            "model_type": "cohere2",
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
            "logit_scale": 4.0,
            "rope_theta": 50000.0,
            "sliding_window": spec.sliding_window,
            "tie_word_embeddings": True,
            "use_qk_norm": False,
            # How SGLang is told to have two pools, whatever the model.
            "is_hybrid_swa": True,
            "hybrid_layer_pattern": [int(s) for s in slides],
        }
    if spec.arch == "lfm2":
        return common | {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "block_auto_adjust_ff_dim": False,
            "conv_bias": False,
            "conv_L_cache": spec.conv_kernel,
            "layer_types": ["full_attention" if i % 2 else "conv" for i in range(spec.layers)],
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
    raise ValueError(f"unknown arch {spec.arch!r}: use one of {', '.join(SPECS)}, mla")


def _weights(spec: TinySpec) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(spec.seed)
    tensors: dict[str, Any] = {}

    def normal(name: str, rows: int, cols: int, std: float) -> None:
        tensors[name] = torch.empty(rows, cols).normal_(0.0, std, generator=generator)

    def norm(name: str, size: int) -> None:
        # Gemma stores the norm's weight as an offset from one.
        value = 0.0 if spec.arch == "gemma3" else 1.0
        tensors[name] = torch.full((size,), value)

    if spec.arch == "lfm2":
        _lfm2_weights(spec, normal, norm, tensors)
        return tensors
    q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    normal("model.embed_tokens.weight", spec.vocab, spec.hidden, 0.02)
    for i in range(spec.layers):
        prefix = f"model.layers.{i}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        # A query times a key has standard deviation of about 2 after the 1/sqrt(head_dim): peaked,
        # but not so sharp that rounding noise in one score changes which token is attended to.
        normal(attention + "q_proj.weight", q_size, spec.hidden, 0.09)
        normal(attention + "k_proj.weight", kv_size, spec.hidden, 0.09)
        normal(attention + "v_proj.weight", kv_size, spec.hidden, 0.06)
        normal(attention + "o_proj.weight", spec.hidden, q_size, 0.1)
        normal(mlp + "gate_proj.weight", spec.intermediate, spec.hidden, 0.06)
        normal(mlp + "up_proj.weight", spec.intermediate, spec.hidden, 0.06)
        normal(mlp + "down_proj.weight", spec.hidden, spec.intermediate, 0.06)
        norm(prefix + "input_layernorm.weight", spec.hidden)
        if spec.arch != "cohere2":
            norm(prefix + "post_attention_layernorm.weight", spec.hidden)
        if spec.arch == "gemma3":
            norm(prefix + "pre_feedforward_layernorm.weight", spec.hidden)
            norm(prefix + "post_feedforward_layernorm.weight", spec.hidden)
            # Queries and keys are normalised per head here: their scale sits in these weights.
            tensors[attention + "q_norm.weight"] = torch.full((spec.head_dim,), 0.5)
            tensors[attention + "k_norm.weight"] = torch.full((spec.head_dim,), 0.5)
    norm("model.norm.weight", spec.hidden)
    if spec.arch == "llama":
        normal("lm_head.weight", spec.vocab, spec.hidden, 0.06)
    return tensors


def _lfm2_weights(
    spec: TinySpec,
    normal: Callable[[str, int, int, float], None],
    norm: Callable[[str, int], None],
    tensors: dict[str, Any],
) -> None:
    import torch

    q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    normal("model.embed_tokens.weight", spec.vocab, spec.hidden, 0.02)
    for i in range(spec.layers):
        prefix = f"model.layers.{i}."
        attention, conv, mlp = prefix + "self_attn.", prefix + "conv.", prefix + "feed_forward."
        if i % 2:
            normal(attention + "q_proj.weight", q_size, spec.hidden, 0.09)
            normal(attention + "k_proj.weight", kv_size, spec.hidden, 0.09)
            normal(attention + "v_proj.weight", kv_size, spec.hidden, 0.06)
            normal(attention + "out_proj.weight", spec.hidden, q_size, 0.1)
            # Queries and keys are normalised per head: their scale sits in these weights.
            tensors[attention + "q_layernorm.weight"] = torch.full((spec.head_dim,), 0.5)
            tensors[attention + "k_layernorm.weight"] = torch.full((spec.head_dim,), 0.5)
        else:
            normal(conv + "in_proj.weight", 3 * spec.hidden, spec.hidden, 0.06)
            normal(conv + "conv.weight", spec.hidden, spec.conv_kernel, 0.5)
            tensors[conv + "conv.weight"] = tensors[conv + "conv.weight"].unsqueeze(1)
            normal(conv + "out_proj.weight", spec.hidden, spec.hidden, 0.1)
        normal(mlp + "w1.weight", spec.intermediate, spec.hidden, 0.06)
        normal(mlp + "w3.weight", spec.intermediate, spec.hidden, 0.06)
        normal(mlp + "w2.weight", spec.hidden, spec.intermediate, 0.06)
        norm(prefix + "operator_norm.weight", spec.hidden)
        norm(prefix + "ffn_norm.weight", spec.hidden)
    norm("model.embedding_norm.weight", spec.hidden)


def _write_tokenizer(path: Path, spec: TinySpec) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Python's own help texts: English prose that every installation has.
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BOS_ID],
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "pad_token": SPECIAL_TOKENS[PAD_ID],
            "model_max_length": spec.max_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def make_tiny_model(path: Path | str, spec: TinySpec = LLAMA, *, weights: bool = True) -> Path:
    """Writes the model directory of `spec` to `path` (created if missing) and returns it.

    Without `weights` the engine must be told to make its own: `--load-format dummy`.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", _config(spec))
    _write_json(
        path / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
    )
    _write_tokenizer(path, spec)
    if weights:
        save_file(_weights(spec), path / "model.safetensors", metadata={"format": "pt"})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random model directory.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", choices=tuple(SPECS), default="llama")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--max-len", type=int)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    base = SPECS[args.arch]
    changes = {
        key: value
        for key, value in vars(args).items()
        if key not in ("path", "arch") and value is not None
    }
    spec = TinySpec(**{**vars(base), **changes})
    print(f"{make_tiny_model(args.path, spec)}: {spec.kv_bytes_per_token} bytes of KV per token")


if __name__ == "__main__":
    main()
