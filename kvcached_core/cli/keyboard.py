# SPDX-License-Identifier: Apache-2.0
"""Keys of a terminal, one by one, and word that its size has changed."""

from __future__ import annotations

import os
import re
import select
import signal
import termios
import tty
from types import FrameType, TracebackType

_SEQUENCES = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b": "escape",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x03": "ctrl-c",
    "\x04": "ctrl-c",  # end of input
}
# Whole sequences, the unknown ones too, so that their letters are not taken for keys.
_KEYS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)


def decode(data: bytes) -> list[str]:
    """Names of the keys in what a terminal sent; printable ones name themselves."""
    found: list[str] = _KEYS.findall(data.decode(errors="replace"))
    return [_SEQUENCES.get(key, key) for key in found]


class Keyboard:
    """A terminal that hands over each key at once, until the block ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> Keyboard:
        self._saved = termios.tcgetattr(self._fd)
        # A signal that interrupts select does not end it, so the size change is read from a pipe.
        self._resized, self._resize = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handler = signal.signal(signal.SIGWINCH, self._on_resize)
        tty.setcbreak(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        signal.signal(signal.SIGWINCH, self._handler)
        os.close(self._resized)
        os.close(self._resize)

    def _on_resize(self, _number: int, _frame: FrameType | None) -> None:
        if not select.select([self._resized], [], [], 0)[0]:
            os.write(self._resize, b"!")

    def wait(self, timeout_s: float) -> list[str]:
        """Keys pressed; an empty list after the time or when the size has changed.

        Raises:
            EOFError: the terminal is gone.
        """
        ready, _, _ = select.select([self._fd, self._resized], [], [], max(timeout_s, 0))
        if self._resized in ready:
            os.read(self._resized, 16)
        if self._fd not in ready:
            return []
        try:
            data = os.read(self._fd, 1024)
        except OSError:
            data = b""
        if not data:
            raise EOFError("the terminal is gone")
        return decode(data)
