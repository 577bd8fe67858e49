# SPDX-License-Identifier: Apache-2.0
"""Running a test in an event loop, and waiting there for what must come about: both bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

LONG_S = 30.0
"""Nothing that a test waits for takes so long unless something hangs."""
_LOOK_S = 0.005


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a whole test."""

    async def bounded() -> None:
        await asyncio.wait_for(main(), 3 * LONG_S)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds."""
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(_LOOK_S)
