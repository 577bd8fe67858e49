# SPDX-License-Identifier: Apache-2.0
"""export: the commits of a work tree as patch files, the same bytes every time."""

from __future__ import annotations

import tempfile
from pathlib import Path

from engine_forks import git
from engine_forks.errors import ForkError
from engine_forks.pin import Pin
from engine_forks.series import write_series

# Everything that depends on the machine, the clock or git's defaults is turned off or fixed.
_FORMAT = (
    "format-patch",
    "--quiet",
    "--no-signature",
    "--zero-commit",
    "--full-index",
    "--no-stat",
    "--no-numbered",
    "--no-renames",
    "--no-thread",
    "--no-binary",
    "--no-encode-email-headers",
    "--subject-prefix=PATCH",
    "--suffix=.patch",
    "--unified=3",
    "--diff-algorithm=histogram",
    "--indent-heuristic",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)


def export(pin: Pin, tree: Path) -> list[str]:
    """Writes the tree's commits over the pin's series; returns the patch names in order."""
    patches = format_series(tree)
    write_series(pin.patches, patches)
    return list(patches)


def format_series(tree: Path) -> dict[str, bytes]:
    """The commits after `base` as patches, by file name in order."""
    if not (tree / ".git").exists():
        raise ForkError(f"{tree} is not a fork's work tree; make one with `apply`")
    if operation := git.in_progress(tree):
        raise ForkError(f"{tree}: {operation} is not finished")
    if changes := git.git(tree, "status", "--porcelain", "--untracked-files=normal"):
        raise ForkError(f"{tree} has changes that are in no commit:\n{changes}")
    commits = f"{git.BASE_TAG}..HEAD"
    if merges := git.git(tree, "rev-list", "--merges", commits):
        raise ForkError(f"{tree}: a series has no merges: {merges.split()[0]}")
    with tempfile.TemporaryDirectory() as scratch:
        git.git(tree, *_FORMAT, f"--output-directory={scratch}", commits)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
