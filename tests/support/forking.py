# SPDX-License-Identifier: Apache-2.0
"""For processes that have imported an engine: what an engine starts are forks of them as well.

A module of the scripts that do so, which have no package around them.
"""

from __future__ import annotations

import multiprocessing


def fork_always() -> None:
    """Has an engine fork its processes, though it orders them to be spawned."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None  # type: ignore[assignment]
    context = multiprocessing.get_context()
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]
