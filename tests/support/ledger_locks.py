# SPDX-License-Identifier: Apache-2.0
"""The locks that members take on a ledger's file, for tests that take them in their place."""

from __future__ import annotations

import fcntl
import os
import struct

MUTEX_BYTE = (1 << 20) - 1
"""Locked in the critical section."""
MEMBER_BYTES = 1 << 20
"""From here on a byte for each slot, locked while its member lives."""


def set_lock(fd: int, kind: int, byte: int) -> None:
    """Lock (``F_RDLCK``, ``F_WRLCK``) or unlock a byte, for the open file and not the process.

    Raises:
        OSError: it is locked by another.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
