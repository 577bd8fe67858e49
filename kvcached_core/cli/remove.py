# SPDX-License-Identifier: Apache-2.0
"""Deleting a ledger file that nobody uses, also one that no release can read."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CtlError

# From csrc/src/ledger_format.h, where they are the same in every version of the file.
_MUTEX_BYTE = (1 << 20) - 1
_MEMBER_BYTES = 1 << 20
_MEMBER_BYTES_LENGTH = 1 << 20
_FLOCK = "hhqqi4x"  # struct flock with 64-bit offsets
_PATIENCE_S = 5.0


def remove(path: Path) -> None:
    """Delete the ledger file at ``path``.

    Whoever opens or joins a ledger looks, inside the critical section, whether the file still has
    its name. So a file that is deleted inside it without a member never gets one.

    Raises:
        CtlError: a member lives, or the file is not ours.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        remedy = "; it is a symbolic link, remove it" if error.errno == errno.ELOOP else ""
        raise CtlError(f"cannot open {path}: {error.strerror}{remedy}") from None
    try:
        owner = os.fstat(fd).st_uid
        if owner != os.geteuid():
            raise CtlError(f"{path} belongs to user {owner}: run kvctl as that user")
        with _critical_section(fd, path):
            if _held(fd, _MEMBER_BYTES, _MEMBER_BYTES_LENGTH):
                raise CtlError(f"{path} has living members: stop them first")
            if os.path.samestat(os.fstat(fd), path.lstat()):
                path.unlink()
    except FileNotFoundError:
        pass  # somebody else was faster
    finally:
        os.close(fd)


@contextmanager
def _critical_section(fd: int, path: Path) -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, _MUTEX_BYTE, 1))
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise CtlError(f"cannot lock {path}: {error.strerror}") from None
        if time.monotonic() >= deadline:
            raise CtlError(f"a process has held {path} for {_PATIENCE_S:g} s: is one stopped?")
        time.sleep(0.005)
    yield  # the lock goes with the descriptor


def _held(fd: int, start: int, length: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _flock(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)
