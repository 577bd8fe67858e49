# SPDX-License-Identifier: Apache-2.0
"""Prompts as token ids: mixed lengths, shared beginnings, fixed batches, always the same."""

from __future__ import annotations

import random

from .tiny_model import SPECIAL_TOKENS

Prompt = list[int]
TWIN_LENGTH = 1200


def tokens(rng: random.Random, count: int, vocab: int = 2048) -> Prompt:
    """`count` token ids without the special ones."""
    return [rng.randrange(len(SPECIAL_TOKENS), vocab) for _ in range(count)]


def mixed_batches(batches: int = 4, batch_size: int = 52, seed: int = 1) -> list[list[Prompt]]:
    """Batches of prompts of 1 to 1500 tokens; every fourth begins like others do."""
    rng = random.Random(seed)
    beginnings = [tokens(rng, 700) for _ in range(4)]
    prompts = []
    for i in range(batches * batch_size):
        low, high = rng.choice([(1, 32), (32, 300), (300, 1501)])
        length = rng.randrange(low, high)
        head = beginnings[i // 4 % 4][:length] if i % 4 == 0 else []
        prompts.append(head + tokens(rng, max(length - len(head), 1)))
    return [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]


def twins(pairs: int = 8, seed: int = 2) -> list[Prompt]:
    """Long prompts in pairs that differ in their first token only.

    A model whose two answers are equal does not read its far cache, and tests with it prove
    nothing.
    """
    rng = random.Random(seed)
    prompts = []
    for _ in range(pairs):
        first, second = rng.sample(range(len(SPECIAL_TOKENS), 1000), 2)
        rest = tokens(rng, TWIN_LENGTH - 1)
        prompts += [[first, *rest], [second, *rest]]
    return prompts


def equal_prompts(count: int, length: int, seed: int) -> list[Prompt]:
    """`count` unrelated prompts of one length, for a load of known size."""
    rng = random.Random(seed)
    return [tokens(rng, length) for _ in range(count)]
