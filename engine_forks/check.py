# SPDX-License-Identifier: Apache-2.0
"""check: the series is whole, small, explained, reproducible and fits the release."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine_forks.apply import apply
from engine_forks.build import patched_files
from engine_forks.errors import ForkError
from engine_forks.export import format_series
from engine_forks.git import BASE_TAG, git
from engine_forks.pin import Pin
from engine_forks.requirements import requirements
from engine_forks.series import ORDER_FILE, read_series

BUDGET = 600
TRAILERS = ("Why", "Upstream-Status", "Removal", "Tests")


@dataclass(frozen=True)
class PatchSize:
    """Lines a patch adds and removes in files the release has, and in files of its own."""

    name: str
    existing: int
    new: int


@dataclass(frozen=True)
class Report:
    sizes: list[PatchSize]
    problems: list[str]

    @property
    def total(self) -> int:
        return sum(size.existing for size in self.sizes)


def check(pin: Pin, archive: Path, wheels: Mapping[str, Path], repo: Path) -> Report:
    """Runs every check and returns all that is wrong, not only the first.

    Args:
        pin: the release and its series.
        archive: the release's source.
        wheels: released wheels that must take the series too, by variant.
        repo: where the tests that patches name may be.
    """
    names = [path.name for path in read_series(pin.patches)]
    with tempfile.TemporaryDirectory(prefix="kvcached-check-") as scratch:
        tree = Path(scratch) / "tree"
        try:
            commits = apply(pin, archive, tree)[1:]
        except ForkError as error:
            return Report([], [str(error)])
        problems = _reproducible(pin, format_series(tree))
        sizes = []
        for name, commit in zip(names, commits, strict=True):
            changes = _changes(tree, commit)
            sizes.append(_size(tree, name, changes))
            problems += _trailers(tree, name, commit, repo)
            problems += _paths(pin, name, list(changes))
            problems += _compiles(tree, name, commit, list(changes))
    report = Report(sizes, problems)
    if report.total > BUDGET:
        problems.append(
            f"the series changes {report.total} lines of existing files, the budget is {BUDGET}"
        )
    for variant, wheel in wheels.items():
        try:
            patched_files(pin, wheel)
            requirements(pin, variant, wheel)
        except ForkError as error:
            problems.append(str(error))
    return report


def _reproducible(pin: Pin, exported: dict[str, bytes]) -> list[str]:
    stored = {path.name: path.read_bytes() for path in read_series(pin.patches)}
    problems = [
        f"{name}: differs from what `export` writes: run `apply`, then `export`"
        for name in sorted(stored.keys() | exported.keys())
        if stored.get(name) != exported.get(name)
    ]
    order = (pin.patches / ORDER_FILE).read_text(encoding="utf-8")
    if not problems and order != "".join(f"{name}\n" for name in exported):
        problems.append(f"{ORDER_FILE}: differs from what `export` writes")
    return problems


def _changes(tree: Path, commit: str) -> dict[str, int]:
    """Lines added plus removed, by file."""
    options = ("diff-tree", "--no-commit-id", "--numstat", "-r", "-z", "--no-renames")
    rows = [row.split("\t", 2) for row in git(tree, *options, commit).split("\0") if row]
    # A binary file counts "-"; export refuses those, so they only need not to crash here.
    return {path: sum(int(n) for n in (added, gone) if n != "-") for added, gone, path in rows}


def _size(tree: Path, name: str, changes: dict[str, int]) -> PatchSize:
    released = set(git(tree, "ls-tree", "-r", "-z", "--name-only", BASE_TAG).split("\0"))
    existing = sum(lines for path, lines in changes.items() if path in released)
    return PatchSize(name, existing, sum(changes.values()) - existing)


def _trailers(tree: Path, name: str, commit: str, repo: Path) -> list[str]:
    wanted = "%(trailers:only,unfold,separator=%x00)"
    lines = git(tree, "log", "-1", f"--format={wanted}", commit).strip("\n").split("\0")
    found = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    problems = [f"{name}: no {key}: trailer" for key in TRAILERS if not found.get(key)]
    words = re.split(r"[\s,]+", found.get("Tests", ""))
    paths = [word.partition("::")[0] for word in words if "/" in word]
    if found.get("Tests") and not paths:
        problems.append(f"{name}: Tests: names no test file")
    for path in paths:
        if not (repo / path).exists() and not (tree / path).exists():
            problems.append(f"{name}: Tests: names {path}, which exists in neither repository")
    return problems


def _paths(pin: Pin, name: str, paths: list[str]) -> list[str]:
    """A patched wheel keeps the release's compiled files, so nothing compiled may change."""
    return [
        f"{name}: changes {path}; only Python in {pin.package}/ and tests/ can be patched"
        for path in paths
        if not (path.startswith(f"{pin.package}/") and path.endswith(".py"))
        and not path.startswith("tests/")
    ]


def _compiles(tree: Path, name: str, commit: str, paths: list[str]) -> list[str]:
    """Each step of the series must be valid Python, so that a person can bisect over it."""
    problems = []
    present = set(git(tree, "ls-tree", "-r", "-z", "--name-only", commit).split("\0"))
    for path in paths:
        if path.endswith(".py") and path in present:
            try:
                compile(git(tree, "show", f"{commit}:{path}"), path, "exec", dont_inherit=True)
            except SyntaxError as error:
                problems.append(f"{name}: {path}:{error.lineno}: {error.msg}")
    return problems
