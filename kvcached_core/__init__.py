# SPDX-License-Identifier: Apache-2.0
"""Elastic KV-cache memory for LLM engines that share a device.

An engine reserves a large virtual KV cache; physical pages back only what is
in use, and all engines on a device draw on the same memory through a ledger.

The scheduler half is :class:`ElasticScheduler`, the worker half
:class:`WorkerArena`; :mod:`kvcached_core.vllm` is what the vLLM patches call.
:class:`Reservation` is for memory beside the engines, a training loop's say.
"""

from __future__ import annotations

from ._core import Ledger, LedgerRefused, Member, VmmError
from .config import Config, ConfigError
from .plan import ArenaShape, RankDevice, StepOps, WorkerBinding
from .reservation import Reservation
from .scheduler import ElasticScheduler
from .worker import WorkerArena

__all__ = [
    "ArenaShape",
    "Config",
    "ConfigError",
    "ElasticScheduler",
    "Ledger",
    "LedgerRefused",
    "Member",
    "RankDevice",
    "Reservation",
    "StepOps",
    "VmmError",
    "WorkerArena",
    "WorkerBinding",
]
