# SPDX-License-Identifier: Apache-2.0
"""From ledgers and the operator's choices to what a terminal of some size shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..units import format_size
from .frames import LedgerFrame
from .select import Target
from .tables import ledger_line, state
from .top_state import Rates, TopState, identity
from .values import printable, show_bytes

HELP = "q quit  s sort  r reverse  j/k select  l limit"
_NAME_WIDTH = 24


@dataclass(frozen=True, slots=True)
class View:
    """All that a frame depends on."""

    frames: Sequence[LedgerFrame]
    state: TopState
    rates: Rates
    used: Mapping[str, int]
    """Bytes in use by anybody according to the driver, of the ledgers for which it answers."""
    taken: float


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[Target, Rates], str]
    drop: int
    """Order in which columns go when the terminal is narrow; 0 stays."""


def _limit(target: Target, _: Rates) -> str:
    member = target.member
    pending = "*" if member.observed_version != member.desired_version else ""
    return show_bytes(member.limit) + pending


def _asked(target: Target, _: Rates) -> str:
    return _size(target.member.asked + target.member.asked_running)


def _size(num_bytes: float) -> str:
    return format_size(num_bytes) if num_bytes else "-"


_COLUMNS = (
    _Column("slot", lambda t, _: f"#{t.member.slot}", 9),
    _Column("member", lambda t, _: printable(t.member.name)[:_NAME_WIDTH], 0),
    _Column("leased", lambda t, _: _size(t.member.leased), 0),
    _Column("committed", lambda t, _: _size(t.member.committed), 10),
    _Column("parked", lambda t, _: _size(t.member.parked), 7),
    _Column("cached", lambda t, _: _size(t.member.cached), 8),
    _Column("guarantee", lambda t, _: _size(t.member.guarantee), 4),
    _Column("limit", _limit, 0),
    _Column("static", lambda t, _: _size(t.member.static_bytes), 3),
    _Column("waiting", lambda t, _: str(t.member.waiting or "-"), 11),
    _Column("asked", _asked, 6),
    _Column("reclaimed/s", lambda t, rates: _size(rates.of(t)), 5),
    _Column("preempted", lambda t, _: str(t.member.counters["preemptions"] or "-"), 2),
    _Column("passed over", lambda t, _: str(t.member.passed_over or "-"), 1),
    _Column("state", lambda t, _: state(t.member), 12),
)


def render(view: View, width: int, height: int) -> RenderableType:
    """One frame; no larger than ``width`` by ``height`` cells."""
    footer = _footer(view.state)
    if not view.frames:
        return Group(_title(view), Text("no ledger yet: waiting for an engine"), footer)
    lines: list[tuple[RenderableType, bool]] = []
    current = view.state.current(view.frames)
    rows = {frame.key: view.state.rows(frame) for frame in view.frames}
    table_of = _Layout([row for part in rows.values() for row in part], view.rates, width)
    for frame in view.frames:
        lines += [(line, False) for line in _head(frame, view.used.get(frame.key), width)]
        if rows[frame.key]:
            lines.append((table_of.titles(), False))
        for target in rows[frame.key]:
            chosen = current is not None and identity(target) == identity(current)
            lines.append((table_of.row(target, chosen), chosen))
        lines.append((Text(), False))
    shown = _window(lines, max(height - 2, 1))
    return Group(_title(view), *shown, footer)


def _window(lines: Sequence[tuple[RenderableType, bool]], room: int) -> list[RenderableType]:
    """The part that fits, with the selected line in it."""
    chosen = next((index for index, line in enumerate(lines) if line[1]), 0)
    first = min(max(0, chosen - room + 2), max(0, len(lines) - room)) if chosen >= room - 1 else 0
    return [line for line, _ in lines[first : first + room]]


def _title(view: View) -> Text:
    order = f"by {view.state.sort}" + (", reversed" if view.state.reverse else "")
    clock = time.strftime("%H:%M:%S", time.localtime(view.taken))
    members = sum(len(frame.living) for frame in view.frames)
    return _line(f"kvtop  {clock}  {members} members, {order}", "bold")


def _footer(chosen: TopState) -> Text:
    if chosen.typing is not None:
        slot = f"#{chosen.selected[1]} of {chosen.selected[0]}" if chosen.selected else ""
        return _line(f"limit of {slot} (8GiB, 25%, none; Esc leaves it): {chosen.typing}_", "bold")
    return _line(chosen.message or HELP, "yellow" if chosen.message else "dim")


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _head(frame: LedgerFrame, used: int | None, width: int) -> list[RenderableType]:
    line = ledger_line(frame)
    line.no_wrap, line.overflow = True, "ellipsis"
    if frame.error is not None:
        return [line]
    if used is not None:
        line.append(f", {format_size(used)} in use on the device", style="not bold")
    return [line, _bar(frame, max(width - 2, 10))]


def _bar(frame: LedgerFrame, width: int) -> Text:
    """The ledger's capacity as one line: live, cached, parked, not KV, headroom, available."""
    idle = frame.cached + frame.parked
    parts = (
        ("live", max(frame.leased - idle, 0), "green", "█"),
        ("cached", frame.cached, "cyan", "▓"),
        ("parked", frame.parked, "blue", "▒"),
        ("not KV", frame.non_kv, "magenta", "█"),
        ("headroom", frame.headroom, "dim", "░"),
    )
    bar = Text(no_wrap=True)
    total = max(frame.capacity, sum(part[1] for part in parts), 1)
    done = cells = 0
    for _, num_bytes, style, glyph in parts:
        done += num_bytes
        # From the running total, so that rounding does not add up.
        upto = done * width // total
        bar.append(glyph * (upto - cells), style=style)
        cells = upto
    return bar.append("·" * (width - cells), style="dim")


class _Layout:
    """Columns of one width in the tables of all ledgers."""

    def __init__(self, rows: Sequence[Target], rates: Rates, width: int) -> None:
        self._rates = rates
        sizes = {
            column.title: max(len(column.title), *(len(column.cell(row, rates)) for row in rows), 0)
            for column in _COLUMNS
        }
        columns = list(_COLUMNS)
        for column in sorted((c for c in _COLUMNS if c.drop), key=lambda c: c.drop):
            if sum(sizes[c.title] + 2 for c in columns) <= width:
                break
            columns.remove(column)
        self._columns = [(column, sizes[column.title]) for column in columns]

    def titles(self) -> RenderableType:
        return self._grid([column.title for column, _ in self._columns], "dim underline")

    def row(self, target: Target, chosen: bool) -> RenderableType:
        style = "dim red" if not target.member.alive else "yellow" if target.member.demand else ""
        cells = [column.cell(target, self._rates) for column, _ in self._columns]
        return self._grid(cells, f"{style} reverse".strip() if chosen else style)

    def _grid(self, cells: Sequence[str], style: str) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for column, size in self._columns:
            left = column.title in ("member", "state")
            grid.add_column(
                justify="left" if left else "right", min_width=size, no_wrap=True, overflow="crop"
            )
        grid.add_row(*(Text(cell) for cell in cells), style=style)
        return grid
