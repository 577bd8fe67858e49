# SPDX-License-Identifier: Apache-2.0
"""Files that hold weights on the host, for as long as any process uses them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import tempfile
from pathlib import Path

from ..units import format_size

_SUFFIX = ".weights"
_DRAFT = ".draft"


class HostFile:
    """A mapped file of this user, locked while it is in use.

    A killed process drops its lock, so what nobody uses is found by trying to lock it.

    Args:
        path: of the file.
        descriptor: of it, locked for shared use.
        num_bytes: of it, which all exist.
    """

    def __init__(self, path: Path, descriptor: int, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._descriptor = descriptor
        # Written to only by who made it; locking it for a device needs a writable mapping.
        self._map = mmap.mmap(descriptor, num_bytes)
        self._view: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * num_bytes).from_buffer(
            self._map
        )
        self.address = ctypes.addressof(self._view)

    @staticmethod
    def open(directory: Path, key: str, num_bytes: int) -> HostFile | None:
        """The file that was published under a key, if it is there and of that size."""
        path = directory / (key + _SUFFIX)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                state = os.fstat(descriptor)
                ours = state.st_uid == os.getuid() and state.st_size == num_bytes
                # Its last user may have deleted it meanwhile.
                if ours and state.st_nlink and path.stat().st_ino == state.st_ino:
                    return HostFile(path, descriptor, num_bytes)
            except (BlockingIOError, FileNotFoundError):
                pass  # somebody is about to delete it
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        return None

    @staticmethod
    def create(directory: Path, num_bytes: int) -> HostFile:
        """A new file that only this process knows.

        Raises:
            OSError: there is no room for it.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = _draft(directory)
        try:
            # Now rather than at the first touch, which would be a bus error.
            os.posix_fallocate(descriptor, 0, num_bytes)
            return HostFile(Path(name), descriptor, num_bytes)
        except BaseException as error:
            Path(name).unlink(missing_ok=True)
            os.close(descriptor)
            if isinstance(error, OSError):
                raise OSError(
                    error.errno,
                    f"no room for {format_size(num_bytes)} of weights in {directory} "
                    f"({error.strerror}): free some, or set KVCACHED_WEIGHTS_DIR to a directory "
                    "that has it (in a container /dev/shm may be small: --shm-size)",
                ) from None
            raise

    def publish(self, key: str) -> None:
        """Let others open it under a key, unless there is one already; it must not change then."""
        path = self.path.with_name(key + _SUFFIX)
        with contextlib.suppress(FileExistsError):
            os.link(self.path, path)
            self.path.unlink()
            self.path = path

    def let_go(self) -> None:
        """Leave the pages to the system, which may write them to disk; they come back when read."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give it up; the last one who does deletes it."""
        if self._view is None:
            return
        self._view = None
        self._map.close()
        _delete_unused(self.path, self._descriptor)
        os.close(self._descriptor)


def _draft(directory: Path) -> tuple[int, str]:
    """A new file, locked, and its name."""
    while True:
        descriptor, name = tempfile.mkstemp(suffix=_DRAFT, dir=directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # Until then it looked like one that a killed process left.
            if os.fstat(descriptor).st_nlink:
                return descriptor, name
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _delete_unused(path: Path, descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(descriptor).st_ino:
            path.unlink()


def sweep(directory: Path) -> None:
    """Delete what killed processes left."""
    for path in [*directory.glob("*" + _SUFFIX), *directory.glob("*" + _DRAFT)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _delete_unused(path, descriptor)
            finally:
                os.close(descriptor)
