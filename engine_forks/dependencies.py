# SPDX-License-Identifier: Apache-2.0
"""What a wheel requires: the lines of its metadata, and which of them a variant replaces."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from engine_forks.errors import ForkError


def project_of(requirement: str) -> str:
    """The project that a requirement names, spelt as an index does."""
    name = re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def is_extra(requirement: str) -> bool:
    """Whether a requirement is of an extra, so not needed by the engine itself."""
    return re.search(r"\bextra\s*==", requirement.partition(";")[2]) is not None


def replaced(
    released: Iterable[str], drops: Collection[str], requires: Collection[str]
) -> set[str]:
    """Those of the released requirements that a variant drops, or states in its own way."""
    required = [line for line in released if not is_extra(line)]
    dropped = {project_of(name) for name in drops}
    # A release that no longer asks for it would leave a pin that says what is not so.
    if unknown := dropped - {project_of(line) for line in required}:
        raise ForkError(f"the wheel does not require what is dropped: {', '.join(sorted(unknown))}")
    gone = dropped | {project_of(line) for line in requires}
    return {line for line in required if project_of(line) in gone}
