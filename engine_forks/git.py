# SPDX-License-Identifier: Apache-2.0
"""git with nothing of the caller's in it: no configuration, identity, hooks or clock."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from engine_forks.errors import ForkError

BASE_TAG = "base"
_WHO = "kvcached"
_MAIL = "kvcached@users.noreply.github.com"
_WHEN = "2000-01-01T00:00:00+0000"
# The engine's own attributes must not convert bytes, and hunk headers must not vary.
_ATTRIBUTES = "* -text -ident -filter -working-tree-encoding\n*.py diff=python\n"


class GitError(ForkError):
    """A git command that failed; `output` is what it printed."""

    def __init__(self, command: str, output: str) -> None:
        super().__init__(f"{command} failed:\n{output}")
        self.output = output


def git(cwd: Path, *args: str) -> str:
    """Runs one git command in `cwd` and returns its standard output."""
    done = subprocess.run(
        ["git", *args],
        cwd=cwd,
        env=_environment(cwd),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
    )
    if done.returncode != 0:
        raise GitError(f"git {args[0]}", (done.stdout + done.stderr).strip())
    return done.stdout


def init(tree: Path) -> None:
    git(tree, "init", "--quiet", "--template=", "--initial-branch=fork")
    info = tree / ".git" / "info"
    info.mkdir(exist_ok=True)
    (info / "attributes").write_text(_ATTRIBUTES, encoding="ascii")


def commit_all(tree: Path, message: str) -> str:
    """Commits every file, ignored ones too, so that the hash depends on the content only."""
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--allow-empty", "--no-gpg-sign", f"--message={message}")
    return git(tree, "rev-parse", "HEAD").strip()


def in_progress(tree: Path) -> str | None:
    """The name of an unfinished git operation in `tree`, if there is one."""
    for state, name in (("rebase-apply", "git am"), ("rebase-merge", "git rebase")):
        if (tree / ".git" / state).exists():
            return name
    return None


def _environment(cwd: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env.update(
        LC_ALL="C",
        TZ="UTC",
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_CONFIG_NOSYSTEM="1",
        GIT_ATTR_NOSYSTEM="1",
        # A folder without its own .git is no part of a repository that happens to enclose it.
        GIT_CEILING_DIRECTORIES=str(cwd.resolve().parent),
        GIT_AUTHOR_NAME=_WHO,
        GIT_AUTHOR_EMAIL=_MAIL,
        GIT_AUTHOR_DATE=_WHEN,
        GIT_COMMITTER_NAME=_WHO,
        GIT_COMMITTER_EMAIL=_MAIL,
        GIT_COMMITTER_DATE=_WHEN,
    )
    return env
