# SPDX-License-Identifier: Apache-2.0
"""Weights for a model that was loaded without any. A module of its own: workers import it."""

from __future__ import annotations

from typing import Any


def use_attention(model: Any) -> int:
    """Gives a dummy model weights whose output depends on its KV cache; returns their number.

    Dummy weights are so small that attention adds nothing, and the model repeats two tokens.
    """
    import torch

    generators: dict[torch.device, torch.Generator] = {}
    count = 0
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            parameter.data.fill_(1.0)
            continue
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        std = 0.1 if name.endswith("o_proj.weight") else 0.02
        parameter.data.normal_(0.0, std, generator=generators[device])
        count += parameter.numel()
    return count


def load_use_attention(model: Any, _: Any) -> None:
    """As SGLang's custom weight loaders are called."""
    use_attention(model)
    if hasattr(model, "post_load_weights"):
        model.post_load_weights()  # latent attention keeps parts of a projection by themselves
