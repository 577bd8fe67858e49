# SPDX-License-Identifier: Apache-2.0
"""The series an engine gets without a metrics class of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from kvcached_core.engine_metrics import EngineMetrics
from kvcached_core.metrics import GAUGES, HISTOGRAMS
from tests.support.block_pool import Engine


def test_every_number_of_the_scheduler_half_is_a_series() -> None:
    engine = Engine(None, 16, 1 << 16)
    registry = CollectorRegistry()
    metrics = EngineMetrics("some:kvcached_", {"model": "m"}, registry)
    stats = engine.scheduler.stats() | {"shortages": 3.0, "map_seconds": [0.5, 0.25]}
    metrics.update(stats)
    value = registry.get_sample_value
    labels = {"model": "m"}
    assert all(value(f"some:kvcached_{name}", labels) is not None for name in GAUGES)
    assert value("some:kvcached_shortages", labels) == 3
    counts = {name: value(f"some:kvcached_{name}_count", labels) for name in HISTOGRAMS}
    assert counts == {**dict.fromkeys(HISTOGRAMS, 0), "map_seconds": 2}
    assert value("some:kvcached_map_seconds_sum", labels) == 0.75
