# SPDX-License-Identifier: Apache-2.0
"""What is seen of memory beside the requests: the device and the ledger while a pattern runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcached_core import Ledger
from kvcached_core._core import Histogram, MemberInfo

_MIB = 1 << 20
_SAMPLE_S = 0.05
_GROWN = 0.95
"""Of the most a member ever held: what comes after that is no growth at full speed."""


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


def exposed(growth: dict[str, Any]) -> dict[str, Any]:
    """How much of the time that mapping took was seen by steps, of what `changes` returned."""
    step, mapped = growth["times"].get("step"), growth["times"].get("map")
    mapping_s = mapped["sum_s"] if mapped else 0.0
    waited_s = step["sum_s"] if step else 0.0
    return {
        "steps": step["count"] if step else 0,
        "step_p99_ms_at_most": step["p99_ms_at_most"] if step else None,
        "step_mean_ms": round(waited_s * 1000 / step["count"], 4) if step else None,
        "pages": growth["counters"]["commits"],
        "mapping_ms": round(mapping_s * 1000, 3),
        "waited_ms": round(waited_s * 1000, 3),
        "hidden_share": round(max(1 - waited_s / mapping_s, 0.0), 4) if mapping_s else None,
    }


@dataclass(frozen=True)
class Held:
    """A member at one moment: bytes, and pages mapped and unmapped since it joined."""

    committed: int
    parked: int
    cached: int
    commits: int
    decommits: int


@dataclass
class Timeline:
    """The device and every member 20 times a second, times in seconds since the run began."""

    rows: list[tuple[float, int, dict[str, Held]]] = field(default_factory=list)
    """Time, bytes in use on the device, members by name."""

    def since(self, begin: float) -> Timeline:
        """With times since `begin`, a `time.perf_counter()` as the rows have."""
        return Timeline([(t - begin, device, members) for t, device, members in self.rows])

    def at(self, t: float) -> dict[str, Held]:
        """The members at the last sample that is not later; the first one before all."""
        found: dict[str, Held] = {}
        for when, _, members in self.rows:
            if when > t and found:
                break
            found = members
        return found

    def as_json(self) -> dict[str, Any]:
        """For a file: MiB and counts, a row a sample."""
        names = sorted({name for _, _, members in self.rows for name in members})
        rows = []
        for t, device, members in self.rows:
            row: list[Any] = [round(t, 3), device // _MIB]
            for name in names:
                held = members.get(name)
                sizes = (held.committed, held.parked, held.cached) if held else (0, 0, 0)
                counts = [held.commits, held.decommits] if held else [0, 0]
                row.append([*(round(size / _MIB, 2) for size in sizes), *counts])
            rows.append(row)
        columns = ["committed", "parked", "cached", "commits", "decommits"]
        return {"names": names, "columns": columns, "rows": rows}


class LedgerWatch:
    """Samples the one ledger of a directory, and the device; nothing without them."""

    def __init__(self, directory: Path | None, used: Callable[[], int] = lambda: 0) -> None:
        paths = [] if directory is None else sorted(directory.glob("*.ledger"))
        self._ledger = Ledger(paths[0]) if paths else None
        self._used = used
        self.timeline = Timeline()
        self._before: dict[str, MemberInfo] = {}
        self._most: dict[str, dict[str, int]] = {}
        self._rising: dict[str, list[MemberInfo]] = {}
        """Each member whenever it held more than ever before."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _members(self) -> dict[str, MemberInfo]:
        return {m.name: m for m in self._ledger.members()} if self._ledger else {}

    def _run(self) -> None:
        due = 0.0
        while not self._stop.wait(0.01):
            members = self._members()
            for name, member in members.items():
                most = self._most.setdefault(name, {"committed": 0, "leased": 0, "waiting": 0})
                if member.committed > most["committed"]:
                    self._rising.setdefault(name, []).append(member)
                for key in most:
                    most[key] = max(most[key], getattr(member, key))
            now = time.perf_counter()
            if now >= due:
                due = now + _SAMPLE_S
                self.timeline.rows.append((now, self._used(), _held(members)))

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
            growth = self._growth(name)
            if growth is not None:
                found[name]["growth"] = exposed(growth)
        return found

    def _growth(self, name: str) -> dict[str, Any] | None:
        """What a member gained until it held nearly all it ever did; None if it never grew."""
        rising: Sequence[MemberInfo] = self._rising.get(name, [])
        before = self._before.get(name)
        if before is None or not rising or rising[-1].committed <= before.committed:
            return None
        enough = _GROWN * rising[-1].committed
        return changes(before, next(m for m in rising if m.committed >= enough))


def _held(members: dict[str, MemberInfo]) -> dict[str, Held]:
    return {
        name: Held(m.committed, m.parked, m.cached, m.counters["commits"], m.counters["decommits"])
        for name, m in members.items()
    }
