# SPDX-License-Identifier: Apache-2.0
"""Elastic KV-cache memory for LLM engines that share a device.

An engine reserves a large virtual KV cache; physical pages back only what is
in use, and all engines on a device draw on the same memory through a ledger.

The scheduler half is :class:`ElasticScheduler`, the worker half
:class:`WorkerArena`; :mod:`kvcached_core.vllm` is what the vLLM patches call.
"""

from __future__ import annotations

from ._core import Ledger, Member, VmmError
from .config import Config, ConfigError
from .plan import ArenaShape, RankDevice, StepOps, WorkerBinding
from .scheduler import ElasticScheduler
from .worker import WorkerArena

__all__ = [
    "ArenaShape",
    "Config",
    "ConfigError",
    "ElasticScheduler",
    "Ledger",
    "Member",
    "RankDevice",
    "StepOps",
    "VmmError",
    "WorkerArena",
    "WorkerBinding",
]
