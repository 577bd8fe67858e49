# SPDX-License-Identifier: Apache-2.0
"""The series an engine adds to its own metrics endpoint."""

from __future__ import annotations

from collections.abc import Sequence

from ._core import Histogram

GAUGES = {
    "capacity_bytes": "Bytes of the ledgers this engine is a member of.",
    "available_bytes": "Bytes this engine could lease now, its policy and others' claims included.",
    "guarantee_bytes": "Bytes that other engines never hold against this one.",
    "limit_bytes": "Bytes this engine never exceeds; the capacity if it has no limit.",
    "demand_bytes": "Bytes this engine waits for.",
    "asked_bytes": "Bytes this engine is asked to give back now.",
    "waiting_requests": "Requests that wait for memory.",
    "leased_bytes": "Bytes the ledgers have promised to this engine.",
    "committed_bytes": "Bytes of physical memory behind this engine's KV cache.",
    "parked_bytes": "Committed bytes with no live block on them, reusable at once.",
    "cached_bytes": "Bytes of unreferenced prefix-cache blocks.",
    "committed_pages": "Page indices committed since start, over all ranks' shapes.",
    "decommitted_pages": "Page indices decommitted since start, likewise.",
    "reclaim_steps": "Steps since start in which other members' demand was answered.",
    "cache_hits": "Cached blocks that were used again, since start.",
    "cache_evictions": "Cached blocks evicted for other engines or the bound, since start.",
    "preemptions": "Running requests preempted for other engines since start.",
    "shortages": "Allocations since start that were put off for want of memory.",
}
"""Name (after ``vllm:kvcached_``) to help text; keys of ``ElasticScheduler.stats``."""

TIMES = {
    "map": "Time of one commit of pages, in the foreground or in the background.",
    "step": "Time one step waited for its memory with nothing of the engine's on the device.",
    "wait": "Time from a shortage of memory until its requests could run.",
    "reclaim": "Time from another engine's claim until the bytes were given back.",
}
"""Keys of ``MemberInfo.histograms`` to help text."""

HISTOGRAMS = {f"{kind}_seconds": text for kind, text in TIMES.items()}
"""Name (after ``vllm:kvcached_``) to help text; also keys of ``ElasticScheduler.stats``."""

BUCKETS = tuple(Histogram.bounds())
"""Upper bounds in seconds, as the ledger counts."""


class HistogramFeed:
    """Turns the ledger's bucket counts into values an engine's own histogram observes.

    Workers count in shared memory, where only the bucket of a time is kept: its
    buckets come out exactly, its sum to within the width of a bucket.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[int]] = {}

    def new_values(self, name: str, counts: Sequence[int]) -> list[float]:
        """One value for each time counted since the last call."""
        seen = self._seen.get(name, [0] * len(counts))
        self._seen[name] = list(counts)
        values: list[float] = []
        for bucket, (now, before) in enumerate(zip(counts, seen, strict=True)):
            middle = 0.75 * BUCKETS[bucket] if bucket < len(BUCKETS) else 1.5 * BUCKETS[-1]
            values += [middle] * (now - before)
        return values
