# SPDX-License-Identifier: Apache-2.0
"""What an elastic SGLang cannot do yet, refused at start with the remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from .config import Config, ConfigError
from .mps import require_launched_with

_STRIDED_BACKENDS = frozenset({"fa3", "flashinfer", "torch_native", "triton"})
"""Attention backends that find a token's row by the tensor's own stride."""


def load_config(server_args: Any) -> Config:
    """The settings of this engine: environment, then ``--kvcached-config``."""
    text = server_args.kvcached_config
    try:
        given = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"--kvcached-config is not JSON ({error}): {text!r}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"--kvcached-config must be a JSON object, not {text!r}")
    return Config.load(given)


def check_supported(server_args: Any) -> None:
    """Refuse what an elastic KV cache cannot do yet, at start, with the remedy.

    Raises:
        ConfigError: one line per obstacle.
    """
    config = load_config(server_args)
    require_launched_with(config)
    a = server_args
    whole = "addresses the whole KV cache, which is mapped only in part"
    obstacles = {
        f"device {a.device!r} has no page backend; use cuda or cpu": a.device
        not in ("cuda", "cpu"),
        f"disaggregation {whole}; drop --disaggregation-mode": a.disaggregation_mode != "null",
        f"the hierarchical cache {whole}; drop --enable-hierarchical-cache": (
            a.enable_hierarchical_cache
        ),
        f"LMCache {whole}; drop --enable-lmcache": a.enable_lmcache,
        "HiSparse keeps pools of its own; drop --enable-hisparse": a.enable_hisparse,
        "speculative decoding has a second KV cache; drop --speculative-algorithm": (
            a.speculative_algorithm is not None
        ),
        "unified memory lays out the KV cache itself; drop --enable-unified-memory": (
            a.enable_unified_memory
        ),
        "the tokens of a block lie side by side; set KVCACHED_LAYOUT to 'block', or unset it": (
            config.layout != "block"
        ),
        "kvcached lays out the KV cache itself; drop --enable-page-major-kv-layout": (
            a.enable_page_major_kv_layout
        ),
        "mixed chunks allocate unchecked; drop --enable-mixed-chunk": a.enable_mixed_chunk,
        "stages of a pipeline schedule apart; use --pp-size 1": a.pp_size > 1,
        "DP attention schedules apart on the same GPUs; drop --enable-dp-attention": (
            a.enable_dp_attention
        ),
        "context parallelism writes packed rows; use --dcp-size 1 and --attn-cp-size 1": (
            a.dcp_size > 1 or a.attn_cp_size > 1
        ),
        "engines over several nodes have no common ledger; use --nnodes 1": a.nnodes > 1,
        "passes may not be left out; use --scheduler-recv-interval 1": (
            a.scheduler_recv_interval > 1
        ),
        "PD multiplexing has a loop of its own; drop --enable-pdmux": a.enable_pdmux,
        "diffusion models allocate unchecked; drop --dllm-algorithm": a.dllm_algorithm is not None,
        f"KV cache type {a.kv_cache_dtype} has a second buffer; use auto or fp8": (
            str(a.kv_cache_dtype).startswith("fp4")
        ),
        "checkpoints of states are a second pool; drop --enable-int8-mamba-checkpoint": (
            a.enable_int8_mamba_checkpoint
        ),
        "rings of states are a second pool; drop --enable-linear-replayssm": (
            a.enable_linear_replayssm
        ),
        "there is no KV cache to be elastic; drop --prefill-only-disable-kv-cache": (
            a.prefill_only_disable_kv_cache
        ),
        "SGLANG_USE_HND_KVCACHE has another layout; unset it": _is_set("SGLANG_USE_HND_KVCACHE"),
        "another prefix tree; unset SGLANG_EXPERIMENTAL_CPP_RADIX_TREE and "
        "SGLANG_ENABLE_UNIFIED_RADIX_TREE": _is_set("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE")
        or _is_set("SGLANG_ENABLE_UNIFIED_RADIX_TREE"),
    }
    _refuse([text for text, stands in obstacles.items() if stands])


def check_backends(names: Sequence[str | None]) -> None:
    """Refuse attention backends that do not read the KV cache by its stride.

    Raises:
        ConfigError: names them and the way out.
    """
    wrong = sorted({str(name) for name in names if name is not None} - _STRIDED_BACKENDS)
    if wrong:
        _refuse(
            [
                f"attention backend {', '.join(wrong)} does not read tokens by their stride; pass "
                "--attention-backend triton, fa3 or flashinfer (torch_native on the CPU)"
            ]
        )


def check_model(
    *, only_windows: bool, windows_and_states: bool, amx_states: bool, sparse: bool, fp8_mla: bool
) -> None:
    """Refuse models whose KV cache is neither tokens, all of them or a window, nor states.

    Args:
        only_windows: every layer keeps a window, and none all tokens.
        windows_and_states: some layers keep a window, and some a state.
        amx_states: states laid out for the AMX units of a CPU.
        sparse: an index beside the KV cache, or compressed caches.
        fp8_mla: latent attention whose kernels convert the whole cache before they read it.

    Raises:
        ConfigError: names what stands in the way.
    """
    obstacles = {
        "windows in every layer allow no pages; pass --disable-hybrid-swa-memory": only_windows,
        "windows beside states; pass --disable-hybrid-swa-memory": windows_and_states,
        "states are laid out for AMX on this CPU; use a GPU, or another model": amx_states,
        "sparse attention, whose index is not elastic yet; use another model": sparse,
        "an fp8 cache of latent attention is read whole; use --kv-cache-dtype auto": fp8_mla,
    }
    _refuse([text for text, stands in obstacles.items() if stands])


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise ConfigError(
            "kvcached was asked for (ENABLE_KVCACHED or --enable-kvcached) and cannot run:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
            + "\nOr switch it off: unset ENABLE_KVCACHED."
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
