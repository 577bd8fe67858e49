# SPDX-License-Identifier: Apache-2.0
"""Wakes a thread that polls descriptors."""

from __future__ import annotations

import contextlib
import os


class Waker:
    """A pipe to poll on: readable from :meth:`wake` until :meth:`drain`."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake(self) -> None:
        """Make it readable; from any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it is readable
            os.write(self._write, b".")

    def drain(self) -> None:
        """Make it wait again."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass
