# SPDX-License-Identifier: Apache-2.0
"""How the demo shows itself: a live panel on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from kvcached_core.units import format_size


class View(Protocol):
    """What the demo tells its watcher."""

    def __enter__(self) -> View: ...
    def __exit__(self, *_: object) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self, text: str) -> Any: ...
    def show(self, row: dict[str, Any], capacity: int) -> None: ...


def make_view(names: Sequence[str], *, plain: bool) -> View:
    """The view for this output: `rich` only where somebody can watch and it is installed."""
    if not plain and sys.stdout.isatty():
        try:
            return LiveView(names)
        except ImportError:
            pass
    return PlainView(names)


class PlainView:
    """One line a second."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._next = 0.0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, flush=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.say(f"{text}: {time.monotonic() - begin:.0f} s")

    def show(self, row: dict[str, Any], capacity: int) -> None:
        if row["t"] < self._next:
            return
        self._next = row["t"] + 1.0
        parts = [
            f"{name} {format_size(row['committed'][name]):>9} ({row['in_flight'][name]:>3} running)"
            for name in self._names
        ]
        free = capacity - sum(row["leased"].values())
        self.say(f"{row['t']:6.1f} s  {'   '.join(parts)}   free {format_size(free):>9}")


class LiveView:
    """A panel that is redrawn in place.

    Raises:
        ImportError: `rich` is not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        from rich.live import Live

        self._names = names
        self._colors = ("cyan", "magenta")
        self._text = ""
        self._live = Live(refresh_per_second=10)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._text = text

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        from rich.spinner import Spinner

        begin = time.monotonic()
        self._live.update(Spinner("dots", text + " ..."))
        yield
        self._live.console.print(f"{text}: {time.monotonic() - begin:.0f} s")

    def show(self, row: dict[str, Any], capacity: int) -> None:
        from rich.bar import Bar
        from rich.panel import Panel
        from rich.table import Table

        table = Table.grid(padding=(0, 1), expand=True)
        for ratio in (1, 5, 1, 1):
            table.add_column(ratio=ratio)
        for name, color in zip(self._names, self._colors, strict=True):
            used = row["committed"][name]
            table.add_row(
                name,
                Bar(capacity, 0, used, color=color, bgcolor="grey23"),
                format_size(used),
                f"{row['in_flight'][name]} running",
            )
        leased = sum(row["leased"].values())
        table.add_row(
            "together",
            Bar(capacity, 0, leased, color="green", bgcolor="grey23"),
            format_size(leased),
            f"of {format_size(capacity)}",
        )
        self._live.update(Panel(table, title=self._text, subtitle=f"{row['t']:.1f} s"))
