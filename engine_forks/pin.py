# SPDX-License-Identifier: Apache-2.0
"""Pins: which upstream release a fork stands on, read from engine_forks/pins/*.toml."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_forks.errors import ForkError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

REPO = Path(__file__).resolve().parent.parent
ANY_PYTHON = "any"


@dataclass(frozen=True)
class Artifact:
    """One file of an upstream release on a package index."""

    project: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Variant:
    """The wheels for one kind of device, and what they require there instead of what they say."""

    wheels: Mapping[str, Mapping[str, Artifact]]
    """By machine, then by Python ("cp312"), or by `ANY_PYTHON`."""
    label: str = ""
    """Part of the fork's version, where two variants are made of one released wheel."""
    drops: frozenset[str] = frozenset()
    """Projects that are not required here."""
    requires: tuple[str, ...] = ()
    """Requirements here; each replaces what the wheel says of that project."""


@dataclass(frozen=True)
class Pin:
    """One upstream release and the fork made of it."""

    engine: str
    version: str
    revision: int
    package: str
    version_file: str
    python: str
    torch: str
    requires: tuple[str, ...]
    source: Artifact
    variants: Mapping[str, Variant]
    source_build: Mapping[str, str]
    test_requires: tuple[str, ...]
    patches: Path

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.version}"

    def fork_version(self, variant: str) -> str:
        label = self.variant(variant).label
        return f"{self.version}+kvcached.{self.revision}" + (f".{label}" if label else "")

    def variant(self, name: str) -> Variant:
        if name not in self.variants:
            raise ForkError(f"{self.name} has no variant {name!r}; it has: {_names(self.variants)}")
        return self.variants[name]

    def wheel(
        self, variant: str, machine: str | None = None, python: str | None = None
    ) -> Artifact:
        """The released wheel of a variant, by default the one that this Python could install."""
        machine = machine or platform.machine()
        python = python or "cp{}{}".format(*sys.version_info)
        by_machine = self.variant(variant).wheels
        if machine not in by_machine:
            raise ForkError(
                f"{self.name} {variant} is not released for {machine!r}; for: {_names(by_machine)}"
            )
        by_python = by_machine[machine]
        artifact = by_python.get(python) or by_python.get(ANY_PYTHON)
        if artifact is None:
            raise ForkError(
                f"{self.name} {variant} is not released for {python!r}; for: {_names(by_python)}"
            )
        return artifact


def pin_names(root: Path = REPO) -> list[str]:
    return sorted(path.stem for path in (root / "engine_forks" / "pins").glob("*.toml"))


def load_pin(name: str, root: Path = REPO) -> Pin:
    path = root / "engine_forks" / "pins" / f"{name}.toml"
    if not path.is_file():
        raise ForkError(f"no pin {name!r}; there is: {_names(pin_names(root)) or 'none'}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return _parse(raw, root)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ForkError(f"{path}: not a valid pin: {error!r}") from error


def _parse(raw: Mapping[str, Any], root: Path) -> Pin:
    return Pin(
        engine=raw["engine"],
        version=raw["version"],
        revision=int(raw["revision"]),
        package=raw["package"],
        version_file=raw["version_file"],
        python=raw["python"],
        torch=raw["torch"],
        requires=tuple(raw["requires"]),
        source=Artifact(**raw["source"]),
        variants=_variants(raw["wheels"], raw.get("variants", {})),
        source_build=dict(raw.get("source_build", {})),
        test_requires=tuple(raw["tests"]["requires"]),
        patches=root / "patches" / raw["engine"] / raw["version"],
    )


def _variants(wheels: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Variant]:
    """One variant for each kind of released wheel, and those that `changes` makes of another's."""
    released = {
        name: {machine: _by_python(entry) for machine, entry in by_machine.items()}
        for name, by_machine in wheels.items()
    }
    variants = {name: Variant(by_machine) for name, by_machine in released.items()}
    for name, change in changes.items():
        variants[name] = Variant(
            released[change.get("wheels", name)],
            change.get("label", ""),
            frozenset(change.get("drops", ())),
            tuple(change.get("requires", ())),
        )
    return variants


def _by_python(entry: Mapping[str, Any]) -> dict[str, Artifact]:
    """One wheel for any Python, or a table of wheels by Python's tag."""
    if "file" in entry:
        return {ANY_PYTHON: Artifact(**entry)}
    return {python: Artifact(**artifact) for python, artifact in entry.items()}


def _names(names: Any) -> str:
    return ", ".join(sorted(names))
