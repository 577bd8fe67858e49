# SPDX-License-Identifier: Apache-2.0
"""How a command fails."""

from __future__ import annotations

FAILED = 1
TIMED_OUT = 3  # 2 is taken: wrong usage


class CtlError(Exception):
    """A command failed; the message says why and names the remedy."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
