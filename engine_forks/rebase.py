# SPDX-License-Identifier: Apache-2.0
"""rebase: try the series on another release, and leave what needs a person to a person."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engine_forks import git
from engine_forks.apply import am, apply, unpack
from engine_forks.errors import ForkError
from engine_forks.pin import Pin
from engine_forks.series import read_series


@dataclass(frozen=True)
class Outcome:
    """How one patch fared: `how` is "exact", "merged" (three-way) or "conflict"."""

    name: str
    how: str
    files: tuple[str, ...] = ()


def rebase(pin: Pin, archive: Path, onto: Path, tree: Path) -> list[Outcome]:
    """Tries every patch on the release `onto`, then leaves `tree` at the first conflict."""
    if tree.exists():
        raise ForkError(f"{tree} exists and may hold work: move it or name another --tree")
    patches = read_series(pin.patches)
    apply(pin, archive, tree)
    # From here git knows what each patch was made on, also where an earlier one changed that file.
    git.git(tree, "reset", "--quiet", "--hard", git.BASE_TAG)
    new_base = _replace_content(tree, onto, pin.package)
    outcomes = [_try(tree, patch) for patch in patches]
    git.git(tree, "reset", "--quiet", "--hard", new_base)
    try:
        # One call for all: git keeps the rest of the series queued behind a conflict.
        if patches:
            am(tree, *patches, three_way=True)
    except git.GitError:
        if git.in_progress(tree) is None:
            raise
    return outcomes


def _replace_content(tree: Path, onto: Path, package: str) -> str:
    """Commits the other release on top, so that git knows both sides of a three-way merge."""
    new = tree.with_name(f"{tree.name}.new")
    unpack(onto, new, package)
    try:
        for path in tree.iterdir():
            if path.name != ".git":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in new.iterdir():
            path.rename(tree / path.name)
    finally:
        shutil.rmtree(new)
    commit = git.commit_all(tree, f"{onto.name} as released")
    git.git(tree, "tag", "--force", git.BASE_TAG)
    return commit


def _try(tree: Path, patch: Path) -> Outcome:
    try:
        am(tree, patch)
        return Outcome(patch.name, "exact")
    except git.GitError:
        git.git(tree, "am", "--abort")
    try:
        am(tree, patch, three_way=True)
        return Outcome(patch.name, "merged")
    except git.GitError:
        unmerged = git.git(tree, "diff", "--name-only", "--diff-filter=U", "-z").split("\0")
        git.git(tree, "am", "--abort")
        return Outcome(patch.name, "conflict", tuple(name for name in unmerged if name))
