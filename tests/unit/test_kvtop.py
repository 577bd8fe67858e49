# SPDX-License-Identifier: Apache-2.0
"""kvtop: what it renders, what its keys do, and the program on a terminal of its own."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from kvcached_core._core import Ledger, Member
from kvcached_core.cli.frames import LedgerFrame, Ledgers
from kvcached_core.cli.keyboard import decode
from kvcached_core.cli.kvtop import Top
from kvcached_core.cli.top_state import SORTS, Quit, Rates, SetLimit, TopState
from kvcached_core.cli.top_view import HELP, View, render
from tests.support.ledger_member import MIB
from tests.support.ledger_member import member as process


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "ledgers"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def members(directory: Path) -> Iterator[list[Member]]:
    ledger = Ledger(directory / "host-0.ledger", 1024 * MIB)
    made = [ledger.join(name) for name in ("small", "large", "middle")]
    for member, size in zip(made, (10, 300, 20), strict=True):
        assert member.lease(size * MIB)
    yield made
    for member in made:
        member.leave()


def frames(directory: Path) -> list[LedgerFrame]:
    return Ledgers(directory).frames()


def text(view: View, width: int = 200, height: int = 50) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    console.print(render(view, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def view(directory: Path, state: TopState | None = None) -> View:
    return View(frames(directory), state or TopState(), Rates(), {}, 0.0)


# -- rendering ------------------------------------------------------------------------------------


def test_frame(directory: Path, members: list[Member]) -> None:
    members[0].set_demand(7 * MIB, 3)
    members[1].set_cached(40 * MIB)
    members[1].count("preemptions", 9)
    lines = text(view(directory))
    whole = "\n".join(lines)
    titles = next(line for line in lines if "leased" in line and "parked" in line)
    for title in ("committed", "cached", "limit", "guarantee", "static", "waiting", "asked"):
        assert title in titles
    for title in ("reclaimed/s", "preempted", "passed over"):
        assert title in titles
    assert "330.0 MiB leased" in whole
    large = next(line for line in lines if "large" in line)
    assert re.search(r"300\.0 MiB.*40\.0 MiB.* 9 ", large)
    assert re.search(r"small.* 3 .*short", whole)
    order = [name for line in lines for name in ("small", "large", "middle") if name in line]
    assert order == ["large", "middle", "small"]
    assert lines[-1].strip() == HELP


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [6, 10, 24])
def test_frame_fits_any_terminal(
    directory: Path, members: list[Member], width: int, height: int
) -> None:
    ledger = Ledger(directory / "host-0.ledger")
    more = [ledger.join(f"engine-with-a-long-name-{number}") for number in range(20)]
    for down in (0, 1, 5, 22):
        state = TopState(sort="slot")
        for _ in range(down):
            state.press("down", frames(directory))
        lines = text(view(directory, state), width, height)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        current = state.current(frames(directory))
        assert current is not None
        assert any(current.member.name[:20] in line for line in lines)
    for member in more:
        member.leave()


def test_no_ledger_and_bad_ledger(directory: Path) -> None:
    assert "no ledger yet" in "\n".join(text(view(directory)))
    path = directory / "host-bad.ledger"
    path.write_bytes(b"nonsense" * 100)
    path.chmod(0o600)
    assert "not a ledger" in "\n".join(text(view(directory)))


def test_device_totals_are_shown_where_known(directory: Path, members: list[Member]) -> None:
    with_total = View(frames(directory), TopState(), Rates(), {"host-0": 900 * MIB}, 0.0)
    assert "900.0 MiB in use on the device" in "\n".join(text(with_total))


def test_pending_limit_has_a_star(directory: Path, members: list[Member]) -> None:
    version = Ledger(directory / "host-0.ledger").set_policy(
        members[1].slot, members[1].generation, limit=400 * MIB
    )
    assert "400.0 MiB*" in "\n".join(text(view(directory)))
    members[1].observe(version)
    assert "400.0 MiB*" not in "\n".join(text(view(directory)))


def test_rates(directory: Path, members: list[Member]) -> None:
    rates, state = Rates(), TopState()
    rates.update(frames(directory), now=10.0)
    members[1].count("reclaimed_bytes", 6 * MIB)
    rates.update(frames(directory), now=12.0)
    first = state.rows(frames(directory)[0])[0]
    assert rates.of(first) == 3 * MIB
    rates.update(frames(directory), now=12.01)  # a key was pressed: too soon to tell
    assert rates.of(first) == 3 * MIB
    rates.update(frames(directory), now=14.0)
    assert rates.of(first) == 0


# -- keys -----------------------------------------------------------------------------------------


def test_decode() -> None:
    assert decode(b"qj\x1b[A\x1bOB\r\x7f\x03") == [
        *("q", "j", "up", "down", "enter", "backspace", "ctrl-c")
    ]
    assert decode(b"\x1b") == ["escape"]
    assert decode(b"\x1b[3~s") == ["\x1b[3~", "s"]  # an unknown one; its letters are no keys


def test_sorting_and_selecting(directory: Path, members: list[Member]) -> None:
    state, seen = TopState(), frames(directory)

    def name() -> str:
        current = state.current(seen)
        assert current is not None
        return current.member.name

    assert name() == "large"
    state.press("j", seen)
    assert name() == "middle"
    state.press("down", seen)
    state.press("down", seen)
    assert name() == "small"  # the last one stays
    state.press("r", seen)
    assert name() == "small"  # the selection goes with the member
    assert [row.member.name for row in state.rows(seen[0])] == ["small", "middle", "large"]
    state.press("k", seen)
    assert name() == "small"
    for expected in [*list(SORTS)[1:], next(iter(SORTS))]:
        state.press("s", seen)
        assert state.sort == expected
    assert isinstance(state.press("q", seen), Quit)


def test_typing_a_limit(directory: Path, members: list[Member]) -> None:
    state, seen = TopState(), frames(directory)
    assert state.press("l", seen) is None
    for key in ("q", "9", "backspace", "backspace", "1", "%"):  # q is no command now
        assert state.press(key, seen) is None
    assert state.typing == "1%"
    command = state.press("enter", seen)
    assert isinstance(command, SetLimit)
    assert (command.target.member.name, command.text) == ("large", "1%")
    state.press("l", seen)
    state.press("5", seen)
    assert state.press("escape", seen) is None
    assert state.typing is None
    state.press("l", seen)
    state.press("5", seen)
    members[1].leave()
    assert state.press("enter", frames(directory)) is None
    assert state.message == "the member is gone"


def test_limit_is_set_or_refused(directory: Path, members: list[Member]) -> None:
    top = Top(Ledgers(directory), [])
    top.look()
    for key in ("l", *"50%", "enter"):
        assert top.press(key)
    assert members[1].info().limit == 512 * MIB
    assert "limit 512.0 MiB" in top.state.message
    for key in ("l", *"lots", "enter"):
        assert top.press(key)
    assert "not a size" in top.state.message
    assert members[1].info().limit == 512 * MIB


# -- the program on a terminal --------------------------------------------------------------------


class Terminal:
    """A program on a pseudo terminal, and all that it wrote."""

    def __init__(self, directory: Path, rows: int, columns: int, *args: str) -> None:
        self._main, terminal = pty.openpty()
        self.resize(rows, columns)
        command = [sys.executable, "-m", "kvcached_core.cli.kvtop", "--ledger-dir", str(directory)]
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.before = termios.tcgetattr(terminal)
        self.process = subprocess.Popen(
            [*command, *args],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=env | {"TERM": "xterm-256color"},
            start_new_session=True,
            # Its controlling terminal, for keys that are signals.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._terminal = terminal
        self.written = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        self.written = ""
        os.write(self._main, keys.encode())

    def until(self, done: Callable[[str], object]) -> None:
        deadline = time.monotonic() + 20
        while not done(self.written):
            assert time.monotonic() < deadline, self.written[-4000:]
            if select.select([self._main], [], [], 0.1)[0]:
                self.written += os.read(self._main, 65536).decode(errors="replace")

    def end(self) -> int:
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._main], [], [], 0.05)[0]:
                self.written += os.read(self._main, 65536).decode(errors="replace")
        return self.process.wait(timeout=1)

    def settings(self) -> list[object]:
        return list(termios.tcgetattr(self._terminal))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._main)
        os.close(self._terminal)


@contextmanager
def terminal(directory: Path, *args: str, rows: int = 30, columns: int = 150) -> Iterator[Terminal]:
    made = Terminal(directory, rows, columns, *args)
    try:
        yield made
    finally:
        made.close()


def test_live(directory: Path) -> None:
    path = directory / "host-0.ledger"
    with (
        process(path, name="first", live=200 * MIB),
        process(path, name="second", live=50 * MIB, parked=50 * MIB),
        terminal(directory, "--interval", "100ms") as screen,
    ):
        screen.until(lambda text: "first" in text and "second" in text and HELP in text)
        assert "\x1b[?1049h" in screen.written  # the alternate screen
        screen.press("s")
        screen.until(lambda text: "by committed" in text)
        screen.press("r")
        screen.until(lambda text: "reversed" in text)
        screen.press("rssss\x1b[B")  # by name, the second one
        screen.until(lambda text: "by name" in text)
        screen.press("l60MiB")
        screen.until(lambda text: "#1 of host-0 (8GiB, 25%, none; Esc leaves it): 60MiB_" in text)
        screen.press("\r")
        screen.until(lambda text: "limit 60.0 MiB (was none)" in text)
        deadline = time.monotonic() + 10
        while Ledger(path).members()[1].leased > 60 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert Ledger(path).members()[0].limit is None
        screen.press("q")
        assert screen.end() == 0
        assert "\x1b[?1049l" in screen.written
        assert screen.settings() == screen.before


def test_resize(directory: Path) -> None:
    # Frames are far apart, so the new width can only come from the change itself.
    with (
        process(directory / "host-0.ledger", name="first", live=MIB),
        terminal(directory, "--interval", "100s") as screen,
    ):
        screen.until(lambda text: "passed over" in text and HELP in text)
        screen.written = ""
        screen.resize(12, 50)
        screen.until(lambda text: HELP in text)
        assert "passed over" not in screen.written
        assert "first" in screen.written
        screen.press("\x03")
        assert screen.end() == 130
        assert screen.settings() == screen.before


def test_termination_leaves_the_terminal_as_it_was(directory: Path) -> None:
    with terminal(directory) as screen:
        screen.until(lambda text: HELP in text)
        screen.process.terminate()
        assert screen.end() == 128 + signal.SIGTERM
        assert "\x1b[?1049l" in screen.written
        assert screen.settings() == screen.before


def test_hangup_ends_it(directory: Path) -> None:
    """As when an ssh session is cut."""
    with terminal(directory) as screen:
        screen.until(lambda text: "no ledger yet" in text)
        os.kill(screen.process.pid, signal.SIGHUP)
        assert screen.end() == -signal.SIGHUP


def test_once_and_without_a_terminal(directory: Path) -> None:
    command = [sys.executable, "-m", "kvcached_core.cli.kvtop", "--ledger-dir", str(directory)]
    with process(directory / "host-0.ledger", name="first", live=MIB):
        once = subprocess.run([*command, "--once"], capture_output=True, text=True, check=True)
        assert "first" in once.stdout
        assert "\x1b" not in once.stdout
        with subprocess.Popen(
            [*command, "--interval", "50ms"], stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            seen = 0
            while seen < 3:
                seen += "first" in running.stdout.readline()
            running.send_signal(signal.SIGINT)
            running.stdout.read()
            assert running.wait(timeout=20) == 130
