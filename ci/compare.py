# SPDX-License-Identifier: Apache-2.0
"""Compares the outcomes of the variants with each other and with the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ci.manifest import Expectation, Manifest, TestFile

MISSING = "missing"
HARMLESS = {"passed", "skipped", "xfailed"}

Table = Mapping[str, str]  # test id -> outcome


def problems(
    manifest: Manifest, files: Iterable[TestFile], tables: Mapping[str, Table]
) -> list[str]:
    """Everything that makes the run fail, one line each.

    The first table is what the others are compared with.
    """
    files = list(files)
    base, *others = tables
    found = [*_unexpected(manifest, files, base, tables[base]), *_too_few(files, tables[base])]
    for variant in others:
        found += _differing(manifest, files, base, variant, tables)
    return found


def counts(table: Table) -> dict[str, int]:
    return dict(sorted(Counter(table.values()).items()))


def by_file(table: Table, spent: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What a row of the manifest is made of."""
    rows: dict[str, dict[str, float]] = {}
    for test, outcome in table.items():
        row = rows.setdefault(file_of(test), {"seconds": 0.0})
        row[outcome] = row.get(outcome, 0) + 1
        row["seconds"] = round(row["seconds"] + spent.get(test, 0.0), 2)
    return rows


def file_of(test: str) -> str:
    return test.partition("::")[0]


def _unexpected(manifest: Manifest, files: list[TestFile], base: str, table: Table) -> list[str]:
    """What the first engine does not pass, unless that is known, and what is known wrongly."""
    known, found = _expected(_of(manifest.known, files), table)
    for test, outcome in sorted(table.items()):
        want = known.get(test)
        if want is not None and outcome != want:
            found.append(f"{test}: known as {want}, but {outcome} on {base}")
        elif want is None and outcome not in HARMLESS:
            found.append(f"{test}: {outcome} on {base}")
    return found


def _too_few(files: list[TestFile], table: Table) -> list[str]:
    """A module missing or a fixture skipping would keep all variants equal, and idle."""
    passed = Counter(file_of(test) for test, outcome in table.items() if outcome == "passed")
    return [
        f"{file.path}: {passed[file.path]} passed, the manifest promises {file.passed}"
        for file in files
        if passed[file.path] < file.passed
    ]


def _differing(
    manifest: Manifest,
    files: list[TestFile],
    base: str,
    variant: str,
    tables: Mapping[str, Table],
) -> list[str]:
    first, table = tables[base], tables[variant]
    tests = sorted({*first, *table})
    listed = [entry for entry in manifest.differences if entry.variant == variant]
    expected, found = _expected(_of(listed, files), tests)
    for test in tests:
        before, got = first.get(test, MISSING), table.get(test, MISSING)
        want = expected.get(test, before)
        if got != want:
            found.append(f"{test}: {got} on {variant}, {want} expected ({before} on {base})")
        elif test in expected and got == before:
            found.append(f"{test}: listed as a difference of {variant}, but {got} on both")
    return found


def _of(entries: Iterable[Expectation], files: list[TestFile]) -> list[Expectation]:
    """The entries about files that were run."""
    paths = {file.path for file in files}
    return [entry for entry in entries if file_of(entry.test) in paths]


def _expected(
    entries: Iterable[Expectation], tests: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """The listed outcome of each test, and a line for each entry that is about no test."""
    tests = list(tests)
    outcomes: dict[str, str] = {}
    stale = []
    for entry in entries:
        covered = [test for test in tests if entry.covers(test)]
        if not covered:
            stale.append(f"{entry.test}: listed in the manifest, but there is no such test")
        outcomes.update(dict.fromkeys(covered, entry.expected))
    return outcomes, stale
