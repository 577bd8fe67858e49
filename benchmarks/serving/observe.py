# SPDX-License-Identifier: Apache-2.0
"""What is seen of memory beside the requests: the ledger's members while a pattern runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from kvcached_core import Ledger
from kvcached_core._core import Histogram, MemberInfo

_MIB = 1 << 20


def quantile_ms(counts: list[int], share: float) -> float | None:
    """Upper bound in ms of the bucket that holds this share of all; None of nothing."""
    total, seen = sum(counts), 0
    bounds = [*Histogram.bounds(), float("inf")]
    for bound, count in zip(bounds, counts, strict=True):
        seen += count
        if total and seen >= share * total:
            return bound * 1000
    return None


def changes(before: MemberInfo, after: MemberInfo) -> dict[str, Any]:
    """What a member's counters and times gained."""
    times = {}
    for kind, histogram in after.histograms.items():
        old = before.histograms[kind]
        counts = [b - a for a, b in zip(old.counts, histogram.counts, strict=True)]
        if sum(counts):
            times[kind] = {
                "count": sum(counts),
                "sum_s": round(histogram.sum_s - old.sum_s, 6),
                "p50_ms_at_most": quantile_ms(counts, 0.5),
                "p99_ms_at_most": quantile_ms(counts, 0.99),
            }
    counters = {key: value - before.counters[key] for key, value in after.counters.items()}
    passed_over = after.passed_over - before.passed_over
    return {"counters": counters, "passed_over": passed_over, "times": times}


class LedgerWatch:
    """Samples the one ledger of a directory; nothing without one."""

    def __init__(self, directory: Path | None) -> None:
        paths = [] if directory is None else sorted(directory.glob("*.ledger"))
        self._ledger = Ledger(paths[0]) if paths else None
        self._before: dict[str, MemberInfo] = {}
        self._most: dict[str, dict[str, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _members(self) -> dict[str, MemberInfo]:
        return {m.name: m for m in self._ledger.members()} if self._ledger else {}

    def _run(self) -> None:
        while self._ledger and not self._stop.wait(0.01):
            for name, member in self._members().items():
                most = self._most.setdefault(name, {"committed": 0, "leased": 0, "waiting": 0})
                for key in most:
                    most[key] = max(most[key], getattr(member, key))

    def __enter__(self) -> LedgerWatch:
        self._before = self._members()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def now(self) -> dict[str, Any]:
        """Every member at this moment."""
        if self._ledger is None:
            return {}
        return {
            "available_mib": self._ledger.available() // _MIB,
            "external_mib": self._ledger.external // _MIB,
            "members": {
                name: {
                    "committed_mib": m.committed // _MIB,
                    "leased_mib": m.leased // _MIB,
                    "static_mib": m.static_bytes // _MIB,
                    "alive": m.alive,
                }
                for name, m in self._members().items()
            },
        }

    def report(self) -> dict[str, Any]:
        """The most of each member, and what its counters gained, since it was entered."""
        if self._ledger is None:
            return {}
        found = {}
        for name, member in self._members().items():
            most = self._most.get(name, {})
            found[name] = {
                "committed_max_mib": most.get("committed", 0) // _MIB,
                "leased_max_mib": most.get("leased", 0) // _MIB,
                "waiting_max": most.get("waiting", 0),
                **(changes(self._before[name], member) if name in self._before else {}),
            }
        return found
