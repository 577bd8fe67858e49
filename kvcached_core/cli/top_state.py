# SPDX-License-Identifier: Apache-2.0
"""What kvtop shows and what its keys do, apart from any terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .._core import MemberInfo
from .frames import LedgerFrame
from .select import Target

SORTS: dict[str, Callable[[MemberInfo], float | str]] = {
    "leased": lambda m: -m.leased,
    "committed": lambda m: -m.committed,
    "cached": lambda m: -m.cached,
    "waiting": lambda m: (-m.waiting << 56) - m.demand,
    "asked": lambda m: -(m.asked + m.asked_running),
    "name": lambda m: m.name,
    "slot": lambda m: m.slot,
}
"""Orders to cycle through; numbers begin with the largest."""

_Identity = tuple[str, int, int]


def identity(target: Target) -> _Identity:
    return target.frame.key, target.member.slot, target.member.generation


@dataclass(frozen=True, slots=True)
class SetLimit:
    """The operator wants this limit for this member."""

    target: Target
    text: str


@dataclass(frozen=True, slots=True)
class Quit:
    """The operator has seen enough."""


@dataclass(slots=True)
class TopState:
    """The operator's choices."""

    sort: str = next(iter(SORTS))
    reverse: bool = False
    selected: _Identity | None = None
    typing: str | None = None
    """The limit being typed; None when none is."""
    message: str = ""

    def rows(self, frame: LedgerFrame) -> list[Target]:
        """The members of a ledger in the order they are shown."""
        order = SORTS[self.sort]
        # Slot last, so that equal ones keep their place from frame to frame.
        members = sorted(frame.shown, key=lambda m: m.slot)
        members.sort(key=order, reverse=self.reverse)
        return [Target(frame, member) for member in members]

    def current(self, frames: Sequence[LedgerFrame]) -> Target | None:
        """The selected member, the first one if that is gone."""
        rows = [target for frame in frames for target in self.rows(frame)]
        for target in rows:
            if identity(target) == self.selected:
                return target
        return rows[0] if rows else None

    def press(self, key: str, frames: Sequence[LedgerFrame]) -> SetLimit | Quit | None:
        """React to a key; a command is for the caller to carry out."""
        if self.typing is not None:
            return self._type(key, frames)
        self.message = ""
        if key in ("q", "Q", "ctrl-c"):
            return Quit()
        if key == "s":
            names = list(SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key == "r":
            self.reverse = not self.reverse
        elif key in ("j", "down"):
            self._move(1, frames)
        elif key in ("k", "up"):
            self._move(-1, frames)
        elif key == "l":
            target = self.current(frames)
            if target is None:
                self.message = "no member to limit"
            else:
                # Stay with this member even if another one comes first meanwhile.
                self.selected = identity(target)
                self.typing = ""
        return None

    def _type(self, key: str, frames: Sequence[LedgerFrame]) -> SetLimit | Quit | None:
        typed = self.typing or ""
        if key == "ctrl-c":
            return Quit()
        if key == "escape":
            self.typing = None
        elif key == "backspace":
            self.typing = typed[:-1]
        elif key == "enter":
            self.typing = None
            target = self.current(frames)
            if target is None or identity(target) != self.selected:
                self.message = "the member is gone"
            elif typed.strip():
                return SetLimit(target, typed.strip())
        elif len(key) == 1 and key.isprintable():
            self.typing = typed + key
        return None

    def _move(self, step: int, frames: Sequence[LedgerFrame]) -> None:
        rows = [identity(target) for frame in frames for target in self.rows(frame)]
        current = self.current(frames)
        if current is not None:
            index = rows.index(identity(current)) + step
            self.selected = rows[min(max(index, 0), len(rows) - 1)]


@dataclass(slots=True)
class Rates:
    """Bytes a second each member gave back because others asked, from frame to frame."""

    _last: dict[_Identity, tuple[float, int]] = field(default_factory=dict)
    _rates: dict[_Identity, float] = field(default_factory=dict)

    def update(self, frames: Sequence[LedgerFrame], now: float | None = None) -> None:
        """Take another look; one that comes at once after another changes nothing."""
        now = time.monotonic() if now is None else now
        seen: dict[_Identity, tuple[float, int]] = {}
        for frame in frames:
            for member in frame.members:
                key = identity(Target(frame, member))
                total = member.counters["reclaimed_bytes"]
                at, before = self._last.get(key, (now, total))
                if now - at >= _SHORTEST_S:
                    self._rates[key] = max(0, total - before) / (now - at)
                    seen[key] = (now, total)
                else:
                    seen[key] = (at, before)
        self._last = seen
        self._rates = {key: rate for key, rate in self._rates.items() if key in seen}

    def of(self, target: Target) -> float:
        return self._rates.get(identity(target), 0.0)


_SHORTEST_S = 0.05
