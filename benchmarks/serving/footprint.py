# SPDX-License-Identifier: Apache-2.0
"""What the live tokens need if packed tightly, against what an engine holds.

Few requests go on while many have ended: their blocks lie where they were put when the pool was
full, and every page with one of them stays. How much more that is than the packed floor is the
price of paging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import Sent
from benchmarks.serving.observe import Held
from benchmarks.serving.patterns import Arrival

_MIB = 1 << 20


@dataclass(frozen=True)
class Paging:
    """Bytes of a block of tokens and of a page."""

    token_bytes: int
    page_bytes: int
    block_tokens: int = 16

    def packed(self, requests: Sequence[int]) -> int:
        """Bytes of the pages that hold requests of so many tokens, and the null block."""
        blocks = 1 + sum(math.ceil(tokens / self.block_tokens) for tokens in requests)
        size = blocks * self.block_tokens * self.token_bytes
        return math.ceil(size / self.page_bytes) * self.page_bytes


def live_tokens(arrivals: Sequence[Arrival], rows: Sequence[Sent], at: float) -> list[int]:
    """Tokens of every request that was being answered then, as if tokens came evenly."""
    found = []
    for arrival, row in zip(arrivals, rows, strict=True):
        if not row.error and row.first <= at < row.last:
            passed = (at - row.first) / (row.last - row.first)
            found.append(arrival.prompt + 1 + int((row.tokens - 1) * passed))
    return found


def quiet_moment(rows: Sequence[Sent], settle_s: float) -> tuple[float, float] | None:
    """When all but the tail have ended and their memory had time to go, and how long it had.

    `settle_s`, or less where the tail is too short for that; None where nothing goes on.
    """
    short = [row.last for row in rows if row.phase == "short" and not row.error]
    tail = [row.last for row in rows if row.phase == "tail" and not row.error]
    if not short or not tail or max(short) >= max(tail):
        return None
    settled = min(settle_s, 0.8 * (max(tail) - max(short)))
    return max(short) + settled, settled


def footprint(
    arrivals: Sequence[Arrival], rows: Sequence[Sent], held: Held, paging: Paging, at: float
) -> dict[str, Any]:
    """The floor and what is held, at one moment."""
    requests = live_tokens(arrivals, rows, at)
    packed = paging.packed(requests)
    return {
        "at_s": round(at, 2),
        "live_requests": len(requests),
        "live_tokens": sum(requests),
        "packed_mib": packed / _MIB,
        "committed_mib": held.committed / _MIB,
        "parked_mib": held.parked / _MIB,
        "cached_mib": held.cached / _MIB,
        "ratio": round(held.committed / packed, 4),
        # Without what the bound on the prefix cache and the parked reserve allow.
        "ratio_in_use": round((held.committed - held.cached - held.parked) / packed, 4),
    }
