# SPDX-License-Identifier: Apache-2.0
"""A patch series on disk: the order file `series` and the patches that it names."""

from __future__ import annotations

from pathlib import Path

from engine_forks.errors import ForkError
from engine_forks.git import git

ORDER_FILE = "series"


def read_series(folder: Path) -> list[Path]:
    """The patches in order. A patch the order file does not name, or names twice, is an error."""
    order = folder / ORDER_FILE
    if not order.is_file():
        raise ForkError(f"no patch series: {order} is missing")
    names = [line.strip() for line in order.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    stray = {path.name for path in folder.glob("*.patch")} ^ set(names)
    if stray:
        raise ForkError(
            f"{order} and the patches beside it disagree on: {', '.join(sorted(stray))}"
        )
    if len(set(names)) != len(names):
        raise ForkError(f"{order} names a patch twice")
    return [folder / name for name in names]


def write_series(folder: Path, patches: dict[str, bytes]) -> None:
    """Replaces the patches in `folder`; other files there are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.patch"):
        if old.name not in patches:
            old.unlink()
    for name, content in patches.items():
        (folder / name).write_bytes(content)
    (folder / ORDER_FILE).write_text("".join(f"{name}\n" for name in patches), encoding="utf-8")


def touched_paths(patch: Path) -> list[str]:
    """The files a patch adds, changes or removes."""
    rows = git(patch.parent, "apply", "--numstat", "-z", str(patch.resolve())).split("\0")
    return [row.split("\t", 2)[2] for row in rows if row]
