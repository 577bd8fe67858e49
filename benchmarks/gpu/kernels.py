# SPDX-License-Identifier: Apache-2.0
"""Which variant of each reduction kernel an engine's compiler chose. Workers import this module.

Inductor times two or three variants of a kernel when an engine starts and keeps the fastest. Two
that are level are picked by chance; they add up in another order, and answers differ at near-ties.
Answers can be compared bit for bit only between engines that chose alike.
"""

from __future__ import annotations

import gc
from typing import Any


def reduction_kernels(model: Any) -> list[str]:
    """Name and chosen configuration of every compiled reduction in this process, sorted."""
    gc.unfreeze()  # The engine hides what it made at start from the collector.
    chosen = []
    for thing in gc.get_objects():
        if type(thing).__name__ != "CachingAutotuner" or len(thing.launchers) != 1:
            continue
        config = thing.launchers[0].config
        if "R0_BLOCK" in config.kwargs:
            chosen.append(f"{thing.fn.__name__} {config}")
    gc.freeze()
    return sorted(chosen)
