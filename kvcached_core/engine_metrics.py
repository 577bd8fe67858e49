# SPDX-License-Identifier: Apache-2.0
"""The series of metrics.py in an engine's own Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Histogram

from .metrics import BUCKETS, GAUGES, HISTOGRAMS


class EngineMetrics:
    """One engine process's series.

    Args:
        prefix: of every name, e.g. ``sglang:kvcached_``.
        labels: the engine's own.
        registry: where they go; by default the process's, or the shared files of
            ``PROMETHEUS_MULTIPROC_DIR``.
    """

    def __init__(
        self, prefix: str, labels: Mapping[str, str], registry: CollectorRegistry = REGISTRY
    ) -> None:
        given: dict[str, Any] = {"labelnames": list(labels), "registry": registry}
        self._gauges = {}
        self._histograms = {}
        for name, text in GAUGES.items():
            gauge = Gauge(prefix + name, text, multiprocess_mode="mostrecent", **given)
            self._gauges[name] = gauge.labels(**labels)
        for name, text in HISTOGRAMS.items():
            histogram = Histogram(prefix + name, text, buckets=BUCKETS, **given)
            self._histograms[name] = histogram.labels(**labels)

    def update(self, stats: Mapping[str, float | Sequence[float]]) -> None:
        """Take over what ``ElasticScheduler.stats`` returned."""
        for name, gauge in self._gauges.items():
            value = stats[name]
            if isinstance(value, (int, float)):
                gauge.set(value)
        for name, histogram in self._histograms.items():
            values = stats[name]
            for value in values if isinstance(values, Sequence) else ():
                histogram.observe(value)
