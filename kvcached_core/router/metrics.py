# SPDX-License-Identifier: Apache-2.0
"""The router's series for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .model import Model
from .states import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "kvcached_router_"
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and times; what is a state is read from the models when asked for."""

    def __init__(
        self, models: Callable[[], Iterable[Model]], faults: Callable[[], int] = lambda: 0
    ) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}requests",
            "Requests by status of the answer",
            ["model", "status"],
            registry=self._registry,
        )
        self.retries = self._counter("retries", "Attempts after the first")
        self.aborted = self._counter("aborted", "Requests whose client went away")
        self.broken = self._counter("broken", "Answers that an engine did not finish")
        self.missed = self._counter(
            "objective_missed", "Requests whose first byte came after the objective for it"
        )
        self.queue_time = self._times(
            "queue_seconds", "An attempt's wait for a replica, wake included"
        )
        self.first_byte = self._times("first_byte_seconds", "From arrival to the first byte")
        self.duration = self._times("request_seconds", "From arrival to the end of the answer")
        self._registry.register(_States(models, faults))

    def text(self) -> bytes:
        """What ``/metrics`` answers."""
        return generate_latest(self._registry)

    def _counter(self, name: str, said: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", said, ["model"], registry=self._registry)

    def _times(self, name: str, said: str) -> Histogram:
        registry = self._registry
        return Histogram(f"{_PREFIX}{name}", said, ["model"], buckets=_TIMES, registry=registry)


class _States(Collector):
    def __init__(self, models: Callable[[], Iterable[Model]], faults: Callable[[], int]) -> None:
        self._models = models
        self._faults = faults

    def collect(self) -> Iterator[Metric]:
        models = list(self._models())
        state = GaugeMetricFamily(
            f"{_PREFIX}model_state", "1 for the state it is in", labels=["model", "state"]
        )
        for model in models:
            for each in State:
                state.add_metric([model.name, each.value], float(model.state is each))
        yield state
        gauges: dict[str, tuple[str, Callable[[Model], float]]] = {
            "pending_requests": ("Requests not answered yet", lambda m: m.pending),
            "waiting_requests": ("Of them, those in the queue", lambda m: m.waiting),
            "idle_seconds": ("Since the last request", lambda m: m.traffic.idle_s),
            "last_wake_seconds": ("What the last wake took", lambda m: m.last_wake_s),
        }
        for name, (said, read) in gauges.items():
            gauge = GaugeMetricFamily(f"{_PREFIX}{name}", said, labels=["model"])
            for model in models:
                gauge.add_metric([model.name], read(model))
            yield gauge
        counters: dict[str, tuple[str, Callable[[Model], float]]] = {
            "wakes": ("Wakes that succeeded", lambda m: m.wakes),
            "failed_wakes": ("Wakes that failed", lambda m: m.failed_wakes),
            "sleeps": ("Times it was put to sleep", lambda m: m.sleeps),
        }
        for name, (said, read) in counters.items():
            counter = CounterMetricFamily(f"{_PREFIX}{name}", said, labels=["model"])
            for model in models:
                counter.add_metric([model.name], read(model))
            yield counter
        healthy = GaugeMetricFamily(
            f"{_PREFIX}replica_healthy", "1 unless left out", labels=["model", "replica"]
        )
        load = GaugeMetricFamily(
            f"{_PREFIX}replica_requests", "Running and queued", labels=["model", "replica"]
        )
        for model in models:
            for replica in model.replicas:
                healthy.add_metric([model.name, replica.name], float(replica.healthy))
                load.add_metric([model.name, replica.name], replica.load)
        yield healthy
        yield load
        yield from self._engines(models)

    def _engines(self, models: list[Model]) -> Iterator[Metric]:
        labels = ["model", "replica"]
        up = GaugeMetricFamily(f"{_PREFIX}engine_up", "1 when ready", labels=labels)
        starts = CounterMetricFamily(f"{_PREFIX}engine_starts", "Processes started", labels=labels)
        crashes = CounterMetricFamily(
            f"{_PREFIX}engine_crashes", "Times it ended unasked", labels=labels
        )
        for model in models:
            for replica in model.replicas:
                supervisor = replica.supervisor
                if supervisor is not None:
                    names = [model.name, replica.name]
                    up.add_metric(names, float(supervisor.ready))
                    starts.add_metric(names, supervisor.starts)
                    crashes.add_metric(names, supervisor.crashes)
        faults = CounterMetricFamily(
            f"{_PREFIX}mps_faults", "Faults of one client that ended others"
        )
        faults.add_metric([], self._faults())
        yield from (up, starts, crashes, faults)
