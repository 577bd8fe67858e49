# SPDX-License-Identifier: Apache-2.0
"""What ``--json`` prints. Keys are only ever added; docs/operations.md lists them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._core import Histogram, LedgerEvent, MemberInfo
from .frames import LedgerFrame

SCHEMA = 1


def dump(value: Any, *, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, allow_nan=False)


def ledgers(directory: Path, frames: Sequence[LedgerFrame]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "ledger_dir": str(directory),
        "ledgers": [ledger(frame) for frame in frames],
    }


def ledger(frame: LedgerFrame) -> dict[str, Any]:
    return {
        "key": frame.key,
        "path": str(frame.path),
        "error": frame.error,
        "time": frame.taken,
        "created": frame.created,
        "capacity_bytes": frame.capacity,
        "headroom_bytes": frame.headroom,
        "external_bytes": frame.external,
        "leased_bytes": frame.leased,
        "committed_bytes": frame.committed,
        "parked_bytes": frame.parked,
        "cached_bytes": frame.cached,
        "available_bytes": frame.available,
        "overdraft_bytes": frame.overdraft,
        "members": [member(frame.key, info) for info in frame.shown],
    }


def member(key: str, info: MemberInfo) -> dict[str, Any]:
    return {
        "ledger": key,
        "slot": info.slot,
        "generation": info.generation,
        "name": info.name,
        "pid": info.pid,
        "alive": info.alive,
        "started": info.started,
        "idle_s": info.idle_s if math.isfinite(info.idle_s) else None,
        "leased_bytes": info.leased,
        "committed_bytes": info.committed,
        "parked_bytes": info.parked,
        "cached_bytes": info.cached,
        "static_bytes": info.static_bytes,
        "to_come_bytes": info.to_come,
        "guessed_bytes": info.guessed,
        "demand_bytes": info.demand,
        "asked_bytes": info.asked,
        "asked_running_bytes": info.asked_running,
        "returning_bytes": info.returning,
        "waiting": info.waiting,
        "guarantee_bytes": info.guarantee,
        "limit_bytes": info.limit,
        "cache_limit_bytes": info.cache_limit,
        "weight": info.weight,
        "priority": info.priority,
        "desired_version": info.desired_version,
        "observed_version": info.observed_version,
        "trim_pending": info.trim_pending,
        "passed_over": info.passed_over,
        "counters": dict(info.counters),
        "times": {kind: histogram(times) for kind, times in info.histograms.items()},
    }


def histogram(times: Histogram) -> dict[str, Any]:
    return {
        "count": times.count,
        "sum_s": times.sum_s,
        "bounds_s": list(Histogram.bounds()),
        "counts": list(times.counts),
    }


def event(key: str, entry: LedgerEvent) -> dict[str, Any]:
    return {
        "ledger": key,
        "seq": entry.seq,
        "time": entry.time,
        "kind": entry.kind,
        "slot": entry.slot,
        "name": entry.name,
        "bytes": entry.bytes,
        "text": entry.text,
    }
