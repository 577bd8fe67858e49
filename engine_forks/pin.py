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


@dataclass(frozen=True)
class Artifact:
    """One file of an upstream release on a package index."""

    project: str
    file: str
    sha256: str


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
    wheels: Mapping[str, Mapping[str, Artifact]]
    source_build: Mapping[str, str]
    test_requires: tuple[str, ...]
    patches: Path

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.version}"

    @property
    def fork_version(self) -> str:
        return f"{self.version}+kvcached.{self.revision}"

    def wheel(self, variant: str, machine: str | None = None) -> Artifact:
        machine = machine or platform.machine()
        by_machine = self.wheels.get(variant)
        if by_machine is None:
            raise ForkError(
                f"{self.name} has no variant {variant!r}; it has: {_names(self.wheels)}"
            )
        if machine not in by_machine:
            raise ForkError(
                f"{self.name} {variant} is not released for {machine!r}; for: {_names(by_machine)}"
            )
        return by_machine[machine]


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
        wheels={
            variant: {machine: Artifact(**entry) for machine, entry in by_machine.items()}
            for variant, by_machine in raw["wheels"].items()
        },
        source_build=dict(raw.get("source_build", {})),
        test_requires=tuple(raw["tests"]["requires"]),
        patches=root / "patches" / raw["engine"] / raw["version"],
    )


def _names(names: Any) -> str:
    return ", ".join(sorted(names))
