# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a pool a request holds, by its length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holding:
    """Of one request."""

    block_tokens: float = 16.0
    """Tokens one block holds, for every KV group."""
    most_blocks: int | None = None
    """It ever holds at once; None for no bound."""
    fixed_blocks: int | None = None
    """It holds whatever its length; None: by its tokens."""

    def blocks_of(self, tokens: int) -> int:
        """Blocks a request of so many tokens holds."""
        if self.fixed_blocks is not None:
            return self.fixed_blocks
        blocks = int(-(-tokens // self.block_tokens))
        return blocks if self.most_blocks is None else min(blocks, self.most_blocks)

    def next_blocks_of(self, tokens: int, more: int) -> int:
        """Blocks a request takes on its way from ``tokens`` tokens to ``more``."""
        if self.fixed_blocks is not None:
            return 0
        blocks = int(-(-more // self.block_tokens)) - int(-(-tokens // self.block_tokens))
        return blocks if self.most_blocks is None else min(blocks, self.most_blocks)
