# SPDX-License-Identifier: Apache-2.0
"""Ledgers, members and events as text for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .._core import Histogram, LedgerEvent, MemberInfo
from ..units import format_size
from .frames import LedgerFrame
from .values import printable, show_bytes

_PIPE_WIDTH = 240  # no terminal, no reason to cut


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def ledger_line(frame: LedgerFrame) -> Text:
    if frame.error is not None:
        return Text(f"{frame.key}: {printable(frame.error)}", style="red")
    line = Text(frame.key, style="bold")
    line.append(
        f"  {format_size(frame.capacity)}: {format_size(frame.leased)} leased, "
        f"{format_size(frame.non_kv)} not KV, {format_size(frame.headroom)} headroom, "
        f"{format_size(frame.available)} available",
        style="not bold",
    )
    if frame.overdraft:
        line.append(f", {format_size(frame.overdraft)} overdraft", style="bold red")
    return line


def listing(frames: Sequence[LedgerFrame]) -> RenderableType:
    parts: list[RenderableType] = []
    for frame in frames:
        parts.append(ledger_line(frame))
        if frame.shown:
            parts.append(_members(frame.shown))
        elif frame.error is None:
            parts.append(Text("  no members\n", style="dim"))
    return Group(*parts)


def _members(members: Sequence[MemberInfo]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("slot", justify="right")
    table.add_column("member")
    for title in ("pid", "leased", "committed", "parked", "cached", "static", "guarantee", "limit"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("weight", "prio", "waiting", "state"):
        table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    for info in members:
        sizes = (info.leased, info.committed, info.parked, info.cached, info.static_bytes)
        table.add_row(
            f"#{info.slot}",
            Text(printable(info.name)),
            str(info.pid),
            *(format_size(size) for size in sizes),
            format_size(info.guarantee),
            show_bytes(info.limit),
            str(info.weight),
            str(info.priority),
            str(info.waiting),
            state(info),
            style="" if info.alive else "dim red",
        )
    return table


def state(info: MemberInfo) -> str:
    """In one word what an operator should know first."""
    if not info.alive:
        return "dead"
    if info.asked_running:
        return "preempting"
    if info.asked or info.trim_pending:
        return "giving back"
    if info.observed_version != info.desired_version:
        return "policy pending"
    return "short" if info.demand else "ok"


def detail(frame: LedgerFrame, info: MemberInfo) -> RenderableType:
    """Everything the ledger knows of a member."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    policy = f"{info.observed_version} of {info.desired_version}"
    rows = {
        "ledger": f"{frame.key} ({frame.path})",
        "member": f"{printable(info.name)}, slot #{info.slot}, generation {info.generation}",
        "state": f"{state(info)}, pid {info.pid}, up {time.time() - info.started:.0f} s, "
        f"last step {info.idle_s:.1f} s ago",
        "holds": f"{format_size(info.leased)} leased, {format_size(info.committed)} committed, "
        f"{format_size(info.parked)} parked, {format_size(info.cached)} cached, "
        f"{format_size(info.static_bytes)} static",
        "may hold": f"guarantee {format_size(info.guarantee)}, limit {show_bytes(info.limit)}, "
        f"prefix cache {show_bytes(info.cache_limit)}",
        "ranks": f"weight {info.weight}, priority {info.priority}",
        "policy": f"version {policy} in effect" + (", trim pending" if info.trim_pending else ""),
        "waits for": f"{format_size(info.demand)} for {info.waiting} requests",
        "is asked for": f"{format_size(info.asked)} unused, "
        f"{format_size(info.asked_running)} of running requests; "
        f"{format_size(info.returning)} on their way",
        "passed over": f"{info.passed_over} times",
        "counters": ", ".join(f"{name} {count}" for name, count in info.counters.items()),
    }
    for title, text in rows.items():
        table.add_row(title, Text(text))
    for kind, times in info.histograms.items():
        table.add_row(f"{kind} time", Text(_times(times)))
    return Group(table, Text())


def _times(times: Histogram) -> str:
    if not times.count:
        return "none yet"
    mean = times.sum_s / times.count * 1e3
    p50, p99 = (_quantile(times, share) for share in (0.5, 0.99))
    return f"{times.count} times, mean {mean:.3g} ms, half {p50}, 99 % {p99}"


def _quantile(times: Histogram, share: float) -> str:
    below = 0
    for bound, count in zip(Histogram.bounds(), times.counts, strict=False):
        below += count
        if below >= share * times.count:
            return f"within {bound * 1e3:.3g} ms"
    return f"above {Histogram.bounds()[-1] * 1e3:.3g} ms"


def event_line(key: str, entry: LedgerEvent) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(entry.time))
    line = Text(f"{at}.{int(entry.time % 1 * 1000):03d} {key} ", style="dim")
    line.append(f"{entry.kind:<11}", style=_STYLES.get(entry.kind, "not dim"))
    who = f"{printable(entry.name)} #{entry.slot} " if entry.name else ""
    size = f"{format_size(entry.bytes)} " if entry.bytes else ""
    line.append(f" {who}{size}{printable(entry.text)}".rstrip(), style="not dim")
    return line


_STYLES = dict.fromkeys(("died", "refused", "passed_over", "overdraft"), "not dim bold red")
