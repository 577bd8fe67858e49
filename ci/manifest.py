# SPDX-License-Identifier: Apache-2.0
"""The list of the engine's own tests that are run, and what is known about them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]


class ManifestError(Exception):
    """The manifest contradicts itself or names something that is not there."""


@dataclass(frozen=True)
class TestFile:
    """One file of tests, relative to the engine's tests/ folder."""

    __test__ = False  # not a test class itself

    path: str
    passed: int  # at least so many pass on the released engine
    seconds: float  # measured, to share the files out among processes
    deselect: tuple[str, ...] = ()  # tests of the file whose id starts with one of these


@dataclass(frozen=True)
class Variant:
    """One way to run the engine. `{tmp}` in `env` becomes a folder of the process's own."""

    name: str
    patched: bool
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Expectation:
    """An outcome of `test`, a whole id or one up to its parameters, that needs a reason."""

    test: str
    expected: str
    reason: str
    variant: str = ""

    def covers(self, test: str) -> bool:
        return test == self.test or test.startswith((f"{self.test}[", f"{self.test}::"))


@dataclass(frozen=True)
class Manifest:
    env: dict[str, str]
    variants: dict[str, Variant]
    tiers: dict[str, tuple[TestFile, ...]]
    known: tuple[Expectation, ...]  # the released engine does not pass it here
    differences: tuple[Expectation, ...]  # a variant's outcome differs from the released engine's

    @property
    def baseline(self) -> str:
        """The released engine."""
        return next(iter(self.variants))

    @property
    def baselines(self) -> list[str]:
        """What the others can be compared with: engines in which nothing is switched on."""
        return [name for name, variant in self.variants.items() if not variant.env]


def load(path: Path) -> Manifest:
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        tiers: dict[str, tuple[TestFile, ...]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for tier, files in data.pop("tier").items():
            # Each tier holds the ones before it; a file listed again replaces its row.
            rows = {**rows, **files}
            tiers[tier] = tuple(_test_file(name, row) for name, row in rows.items())
        manifest = Manifest(
            env=data.pop("env"),
            variants={name: Variant(name, **row) for name, row in data.pop("variant").items()},
            tiers=tiers,
            known=tuple(Expectation(**row) for row in data.pop("known", [])),
            differences=tuple(Expectation(**row) for row in data.pop("difference", [])),
        )
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{path}: {error}") from error
    if data:
        raise ManifestError(f"{path}: unknown entries: {', '.join(data)}")
    _check(manifest, path)
    return manifest


def _test_file(path: str, row: dict[str, Any]) -> TestFile:
    return TestFile(path, **{**row, "deselect": tuple(row.get("deselect", ()))})


def _check(manifest: Manifest, path: Path) -> None:
    listed = {file.path for files in manifest.tiers.values() for file in files}
    for entry in (*manifest.known, *manifest.differences):
        if entry.test.partition("::")[0] not in listed:
            raise ManifestError(f"{path}: {entry.test}: its file is in no tier")
        if not entry.reason.strip():
            raise ManifestError(f"{path}: {entry.test}: a reason is needed")
    for entry in manifest.known:
        if entry.variant:
            raise ManifestError(f"{path}: {entry.test}: `known` holds for all variants")
    for entry in manifest.differences:
        if entry.variant not in manifest.variants or entry.variant == manifest.baseline:
            raise ManifestError(f"{path}: {entry.test}: no variant {entry.variant!r} to differ")
