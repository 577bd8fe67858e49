# SPDX-License-Identifier: Apache-2.0
"""The Prometheus series of a real ledger, and the dashboard over them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcached_core import export
from kvcached_core._core import Histogram, Ledger, Member
from kvcached_core.cli.frames import Ledgers
from tests.support.ledger_member import MIB

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
LABELS = {"ledger": "host-0", "member": 'an "engine"', "slot": "0"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "ledgers"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def member(directory: Path) -> Iterator[Member]:
    """One that has a value in every series."""
    ledger = Ledger(directory / "host-0.ledger", 1024 * MIB, 16 * MIB)
    made = ledger.join(
        LABELS["member"],
        4 * MIB,
        guarantee=8 * MIB,
        limit=512 * MIB,
        weight=50,
        priority=2,
        cache_limit=64 * MIB,
    )
    assert made.lease(100 * MIB)
    made.set_parked(3 * MIB)
    made.set_cached(5 * MIB)
    yield made
    made.leave()


def values(directory: Path) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = export.text(Ledgers(directory).frames)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_member(directory: Path, name: str, **more: str) -> float:
    return values(directory)[f"kvcached_member_{name}", frozenset((LABELS | more).items())]


def test_gauges(directory: Path, member: Member) -> None:
    found = values(directory)
    ledger = frozenset({("ledger", "host-0")})
    assert found["kvcached_ledger_capacity_bytes", ledger] == 1024 * MIB
    assert found["kvcached_ledger_headroom_bytes", ledger] == 16 * MIB
    assert found["kvcached_ledger_leased_bytes", ledger] == 100 * MIB
    assert found["kvcached_ledger_available_bytes", ledger] == (1024 - 16 - 4 - 100) * MIB
    assert found["kvcached_ledger_overdraft_bytes", ledger] == 0
    assert found["kvcached_ledger_readable", ledger] == 1
    expected = {
        "leased_bytes": 100 * MIB,
        "parked_bytes": 3 * MIB,
        "cached_bytes": 5 * MIB,
        "static_bytes": 4 * MIB,
        "guarantee_bytes": 8 * MIB,
        "limit_bytes": 512 * MIB,
        "cache_limit_bytes": 64 * MIB,
        "weight": 50,
        "priority": 2,
        "alive": 1,
    }
    assert {name: of_member(directory, name) for name in expected} == expected


def test_overdraft_is_the_ledgers_own(directory: Path, member: Member) -> None:
    ledger = Ledger(directory / "host-0.ledger")
    ledger.set_device_used(1000 * MIB)
    (frame,) = Ledgers(directory).frames()
    assert frame.overdraft == ledger.overdraft() > 0
    assert frame.available == ledger.available() == 0


def test_what_is_available_is_as_the_ledger_has_it(directory: Path, member: Member) -> None:
    ledger = Ledger(directory / "host-0.ledger")
    member.set_static(50 * MIB)
    member.set_to_come(20 * MIB)
    member.set_guessed(15 * MIB)
    for used in (None, 0, 10 * MIB, 60 * MIB, 300 * MIB):
        if used is not None:
            ledger.set_device_used(used)
        (frame,) = Ledgers(directory).frames()
        assert frame.available == ledger.available() > 0, used


def test_no_limit_is_no_series(directory: Path, member: Member) -> None:
    ledger = Ledger(directory / "host-0.ledger")
    ledger.set_policy(member.slot, member.generation, limit=-1)
    assert not any(name == "kvcached_member_limit_bytes" for name, _ in values(directory))


def test_counters(directory: Path, member: Member) -> None:
    assert set(member.info().counters) == set(export.COUNTERS)
    for number, name in enumerate(export.COUNTERS, 1):
        member.count(name, number)
    assert [of_member(directory, f"{name}_total") for name in export.COUNTERS] == [
        *range(1, len(export.COUNTERS) + 1)
    ]


def test_histograms_have_the_true_buckets(directory: Path, member: Member) -> None:
    assert set(member.info().histograms) == set(export.TIMES)
    for seconds in (1e-6, 1e-5, 1.5e-5, 1e-3, 100.0):
        member.time("map", seconds)
    family = next(
        family
        for family in text_string_to_metric_families(export.text(Ledgers(directory).frames))
        if family.name == "kvcached_member_map_seconds"
    )
    buckets = [
        (float(sample.labels["le"]), sample.value)
        for sample in family.samples
        if sample.name.endswith("_bucket")
    ]
    bounds = [*Histogram.bounds(), float("inf")]
    assert [bound for bound, _ in buckets] == bounds
    times = (1e-6, 1e-5, 1.5e-5, 1e-3, 100.0)
    assert buckets == [(bound, sum(time <= bound for time in times)) for bound in bounds]
    assert of_member(directory, "map_seconds_count") == 5
    assert of_member(directory, "map_seconds_sum") == pytest.approx(sum(times), rel=1e-6)
    assert of_member(directory, "wait_seconds_count") == 0


def test_unreadable_ledger(directory: Path, member: Member) -> None:
    bad = directory / "host-bad.ledger"
    bad.write_bytes(b"nonsense" * 100)
    bad.chmod(0o600)
    found = values(directory)
    assert found["kvcached_ledger_readable", frozenset({("ledger", "host-bad")})] == 0
    assert ("kvcached_ledger_capacity_bytes", frozenset({("ledger", "host-bad")})) not in found
    assert found["kvcached_ledger_readable", frozenset({("ledger", "host-0")})] == 1


def test_replaced_ledger_is_opened_anew(directory: Path) -> None:
    ledgers = Ledgers(directory)
    path = directory / "host-0.ledger"
    Ledger(path, 10 * MIB)
    assert ledgers.frames()[0].capacity == 10 * MIB
    path.unlink()
    assert ledgers.frames() == []
    Ledger(path, 20 * MIB)
    assert ledgers.frames()[0].capacity == 20 * MIB


def test_dashboard_names_only_series_there_are(directory: Path, member: Member) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [
        variable["definition"]
        for variable in dashboard["templating"]["list"]
        if "definition" in variable
    ]
    named = {name for text in expressions for name in re.findall(r"\bkvcached_\w+", text)}
    known = {name for name, _ in values(directory)}
    assert named
    assert named <= known
