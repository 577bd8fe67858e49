# SPDX-License-Identifier: Apache-2.0
"""Which replica of a model a request goes to. Pure policy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

BOUND = 1.25
"""A replica takes prompts for their beginning up to so much more than its even share."""


class Choice(Protocol):
    """A replica."""

    @property
    def name(self) -> str:
        """The same for as long as it lives."""

    @property
    def load(self) -> int:
        """Requests it has or that wait for it."""


C = TypeVar("C", bound=Choice)


def least_loaded(choices: Sequence[C], turn: int) -> C:
    """The one with the fewest requests; among equals, each in turn."""
    least = min(choice.load for choice in choices)
    equals = [choice for choice in choices if choice.load == least]
    return equals[turn % len(equals)]


def prefix_affine(choices: Sequence[C], prefix: bytes) -> C:
    """The same one for the same prefix, as long as it is not loaded beyond the bound.

    Each prefix has an order of the replicas of its own (rendezvous hashing), so that when one comes
    or goes only the prefixes that it had or gets move.
    """
    total = sum(choice.load for choice in choices) + 1
    bound = math.ceil(BOUND * total / len(choices))
    ranked = sorted(choices, key=lambda choice: _rank(choice.name, prefix), reverse=True)
    # One is always below the bound, which is more than the mean.
    return next(choice for choice in ranked if choice.load + 1 <= bound)


def _rank(name: str, prefix: bytes) -> bytes:
    return hashlib.blake2b(prefix, key=hashlib.sha256(name.encode()).digest()).digest()
