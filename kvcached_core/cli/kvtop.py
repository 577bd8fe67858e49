# SPDX-License-Identifier: Apache-2.0
"""``kvtop``: ledgers and members live. Reads the ledger files; opens no device."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import pynvml
import typer
from rich.console import Console
from rich.live import Live

from .._core import VmmError
from ..units import Amount
from ..usage import DeviceUsage
from . import as_json, options, tables
from .entry import run
from .errors import CtlError
from .frames import LedgerFrame, Ledgers
from .keyboard import Keyboard
from .options import Interval, Json, Key, LedgerDir, Names
from .policy import change
from .select import only
from .top_state import Quit, Rates, SetLimit, TopState
from .top_view import View, render

app = typer.Typer(pretty_exceptions_enable=False)
_INTERVAL_S = 1.0
_TERMINATED = 128 + signal.SIGTERM


class DeviceTotals:
    """What NVML says of the GPUs that have a ledger; nothing where it does not answer."""

    def __init__(self) -> None:
        self._usage: dict[str, DeviceUsage | None] = {}

    def read(self, frames: Sequence[LedgerFrame]) -> dict[str, int]:
        totals = {}
        for frame in frames:
            if not frame.key.startswith("gpu-"):
                continue
            try:
                if frame.key not in self._usage:
                    self._usage[frame.key] = None  # asked once, if it fails
                    self._usage[frame.key] = DeviceUsage(frame.key)
                usage = self._usage[frame.key]
                if usage is not None:
                    totals[frame.key] = usage.used_bytes()
            except pynvml.NVMLError:
                continue
        return totals


class Top:
    """The frames of one run."""

    def __init__(self, ledgers: Ledgers, members: Sequence[str]) -> None:
        self.ledgers = ledgers
        self.state = TopState()
        self.frames: list[LedgerFrame] = []
        self._members = members
        self._rates = Rates()
        self._totals = DeviceTotals()
        self._used: dict[str, int] = {}

    def look(self) -> None:
        self.frames = only(self.ledgers.frames(), self._members)
        self._rates.update(self.frames)
        self._used = self._totals.read(self.frames)

    def view(self) -> View:
        return View(self.frames, self.state, self._rates, self._used, time.time())

    def press(self, key: str) -> bool:
        """False once the operator wants to leave."""
        command = self.state.press(key, self.frames)
        if isinstance(command, SetLimit):
            self.state.message = self._limit(command)
            self.look()
        return not isinstance(command, Quit)

    def _limit(self, command: SetLimit) -> str:
        # Not waited for: the limit carries a star until the member has complied.
        try:
            amount = Amount.parse(command.text)
            value = amount.resolve(command.target.frame.capacity)
            done = change(self.ledgers, [command.target], "limit", lambda _: value)
        except (ValueError, CtlError, VmmError) as error:
            return str(error)
        return done[0].describe()


def top(
    members: Names = None,
    interval: Interval = _INTERVAL_S,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    json: Json = False,
    ledger_dir: LedgerDir = None,
    ledger: Key = None,
) -> None:
    """Watch ledgers and members live.

    Keys: q quit, s next sort order, r reverse, j/k or arrows select, l set the limit of the
    selected member. A star at a limit: the member has not complied yet.
    """
    ledgers = Ledgers(options.directory_or_default(ledger_dir), ledger)
    screen = Top(ledgers, members or [])
    interval = max(interval, 0.05)
    if json:
        _repeat(interval, once, lambda: _print_json(screen))
    elif once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        console = tables.console()
        _repeat(interval, once, lambda: _print_text(screen, console))
    else:
        _live(screen, interval)


def _repeat(interval: float, once: bool, show: Callable[[], None]) -> None:
    while True:
        show()
        if once:
            return
        sys.stdout.flush()
        time.sleep(interval)


def _print_json(screen: Top) -> None:
    screen.look()
    value = as_json.ledgers(screen.ledgers.directory, screen.frames)
    print(as_json.dump(value, indent=None))


def _print_text(screen: Top, console: Console) -> None:
    screen.look()
    console.print(render(screen.view(), console.width, 1 << 16))


def _live(screen: Top, interval: float) -> None:
    console = Console(highlight=False)
    # The default would end the process at once and leave the terminal as it is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    with (
        Keyboard(sys.stdin.fileno()) as keyboard,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        due = 0.0
        while True:
            if time.monotonic() >= due:
                screen.look()
                due = time.monotonic() + interval
            live.update(render(screen.view(), console.width, console.height), refresh=True)
            try:
                keys = keyboard.wait(due - time.monotonic())
            except EOFError:
                return
            if not all(screen.press(key) for key in keys):
                return


app.command()(top)


def main(args: Sequence[str] | None = None) -> int:
    return run(app, "kvtop", args)


if __name__ == "__main__":
    sys.exit(main())
