# SPDX-License-Identifier: Apache-2.0
"""A ledger's numbers as Prometheus series; docs/operations.md lists them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ._core import Histogram, MemberInfo
from .cli.frames import LedgerFrame
from .metrics import TIMES

Read = Callable[[], Iterable[LedgerFrame]]

_LEDGER = ["ledger"]
_MEMBER = ["ledger", "member", "slot"]

LEDGER_GAUGES: dict[str, tuple[str, Callable[[LedgerFrame], float]]] = {
    "capacity_bytes": ("Bytes of the device or host share.", lambda f: f.capacity),
    "headroom_bytes": ("Bytes that are never leased.", lambda f: f.headroom),
    "external_bytes": ("Bytes in use by no member.", lambda f: f.external),
    "leased_bytes": ("Bytes promised to members.", lambda f: f.leased),
    "committed_bytes": ("Bytes of physical memory behind KV caches.", lambda f: f.committed),
    "available_bytes": ("Bytes that could be leased now.", lambda f: f.available),
    "overdraft_bytes": (
        "Bytes by which leases, other use and headroom exceed the capacity.",
        lambda f: f.overdraft,
    ),
    "members": ("Living members.", lambda f: len(f.living)),
}
"""Name (after ``kvcached_ledger_``) to help text and value."""

MEMBER_GAUGES: dict[str, tuple[str, Callable[[MemberInfo], float | None]]] = {
    "alive": ("1 while a process of the member lives.", lambda m: m.alive),
    "start_time_seconds": ("When it joined, since the epoch.", lambda m: m.started),
    "idle_seconds": ("Time since it last ran a step.", lambda m: m.idle_s),
    "leased_bytes": ("Bytes the ledger has promised to it.", lambda m: m.leased),
    "committed_bytes": ("Bytes of physical memory behind its KV cache.", lambda m: m.committed),
    "parked_bytes": ("Committed bytes with no live block on them.", lambda m: m.parked),
    "cached_bytes": ("Bytes of unreferenced prefix-cache blocks.", lambda m: m.cached),
    "static_bytes": ("Bytes that are no KV cache: weights, workspace.", lambda m: m.static_bytes),
    "demand_bytes": ("Bytes it waits for.", lambda m: m.demand),
    "asked_bytes": ("Unused bytes it is asked to give back.", lambda m: m.asked),
    "asked_running_bytes": (
        "Bytes beyond those, for which running requests must be preempted.",
        lambda m: m.asked_running,
    ),
    "returning_bytes": ("Bytes given up that are not released yet.", lambda m: m.returning),
    "waiting_requests": ("Requests that wait for memory.", lambda m: m.waiting),
    "guarantee_bytes": ("Bytes it can always have.", lambda m: m.guarantee),
    "limit_bytes": ("Most bytes it may hold; absent without a limit.", lambda m: m.limit),
    "cache_limit_bytes": (
        "Most bytes of unreferenced prefix cache; absent without a bound.",
        lambda m: m.cache_limit,
    ),
    "weight": ("Its share of contended memory.", lambda m: m.weight),
    "priority": ("Higher is served first.", lambda m: m.priority),
    "desired_version": ("Version of the policy that was set.", lambda m: m.desired_version),
    "observed_version": ("Version it has complied with.", lambda m: m.observed_version),
    "trim_pending": ("1 while it has a trim to do.", lambda m: m.trim_pending),
}
"""Name (after ``kvcached_member_``) to help text and value; a value of None is left out."""

COUNTERS = {
    "cache_hits": "Cached blocks that were used again.",
    "cache_evictions": "Prefix-cache blocks given up for memory.",
    "preemptions": "Running requests preempted to give memory back.",
    "reclaimed_bytes": "Bytes given back because others asked.",
    "shortages": "Allocations put off for want of memory.",
    "commits": "Pages mapped, those that a failure undid among them.",
    "decommits": "Pages given back.",
}
"""Keys of ``MemberInfo.counters``."""


class LedgerCollector(Collector):
    """Reads ledgers anew at every scrape."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        frames = list(self._read())
        readable = [frame for frame in frames if frame.error is None]
        up = GaugeMetricFamily(
            "kvcached_ledger_readable", "1 if the ledger file can be read.", labels=_LEDGER
        )
        for frame in frames:
            up.add_metric([frame.key], float(frame.error is None))
        yield up
        for name, (text, value) in LEDGER_GAUGES.items():
            family = GaugeMetricFamily(f"kvcached_ledger_{name}", text, labels=_LEDGER)
            for frame in readable:
                family.add_metric([frame.key], float(value(frame)))
            yield family
        yield from _members([(frame.key, info) for frame in readable for info in frame.members])


def _members(members: list[tuple[str, MemberInfo]]) -> Iterator[Metric]:
    for name, (text, value) in MEMBER_GAUGES.items():
        gauge = GaugeMetricFamily(f"kvcached_member_{name}", text, labels=_MEMBER)
        for key, info in members:
            number = value(info)
            if number is not None:
                gauge.add_metric(_labels(key, info), float(number))
        yield gauge
    passed = CounterMetricFamily(
        "kvcached_member_passed_over", "Asks it did not answer in time.", labels=_MEMBER
    )
    for key, info in members:
        passed.add_metric(_labels(key, info), info.passed_over)
    yield passed
    for name, text in COUNTERS.items():
        counter = CounterMetricFamily(f"kvcached_member_{name}", text, labels=_MEMBER)
        for key, info in members:
            counter.add_metric(_labels(key, info), info.counters[name])
        yield counter
    for name, text in TIMES.items():
        times = HistogramMetricFamily(f"kvcached_member_{name}_seconds", text, labels=_MEMBER)
        for key, info in members:
            recorded = info.histograms[name]
            times.add_metric(_labels(key, info), _buckets(recorded), recorded.sum_s)
        yield times


def _labels(key: str, info: MemberInfo) -> list[str]:
    return [key, info.name, str(info.slot)]


def _buckets(times: Histogram) -> list[tuple[str, float]]:
    """Prometheus buckets, each with all that is below its bound."""
    total = 0
    buckets = []
    for bound, count in zip([*Histogram.bounds(), math.inf], times.counts, strict=True):
        total += count
        # As the client library writes its own bounds, and with the one name for infinity.
        buckets.append(("+Inf" if bound == math.inf else repr(bound), float(total)))
    return buckets


def registry(read: Read) -> CollectorRegistry:
    """A registry of nothing but these series."""
    made = CollectorRegistry()
    made.register(LedgerCollector(read))
    return made


def text(read: Read) -> str:
    """All series in Prometheus' text format."""
    return generate_latest(registry(read)).decode()


def samples(read: Read) -> list[dict[str, Any]]:
    """All series as name, labels and value."""
    return [
        {"name": sample.name, "labels": dict(sample.labels), "value": sample.value}
        for metric in LedgerCollector(read).collect()
        for sample in metric.samples
    ]


@contextmanager
def serve(read: Read, address: str, port: int) -> Iterator[int]:
    """Answer scrapes on ``address``; yields the port, a free one for 0."""
    server, thread = start_http_server(port, address, registry(read))
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
