# SPDX-License-Identifier: Apache-2.0
"""Changing what members may hold, and asking them to give back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .._core import Ledger, MemberInfo, VmmError
from ..units import format_size
from .acknowledge import Request
from .errors import CtlError
from .frames import Ledgers
from .select import Target
from .values import show_bytes

UNBOUNDED = -1  # how Ledger.set_policy writes "none"
SIZES = ("limit", "guarantee", "cache_limit")


@dataclass(frozen=True, slots=True)
class Change:
    """A policy change that is in the ledger."""

    request: Request
    field: str
    old: int | None
    new: int | None
    version: int

    def describe(self) -> str:
        show: Callable[[int | None], str] = show_bytes if self.field in SIZES else str
        name = self.field.replace("_", " ")
        state = "in effect" if self.request.acknowledged else "not acknowledged yet"
        return (
            f"{self.request.target.label}: {name} {show(self.new)} (was {show(self.old)}), "
            f"{state}, version {self.version}"
        )

    def as_json(self) -> dict[str, Any]:
        return _identity(self.request) | {
            "field": self.field,
            "old": self.old,
            "new": self.new,
            "version": self.version,
            "observed_version": self.request.latest.observed_version,
        }


def change(
    ledgers: Ledgers,
    targets: Sequence[Target],
    field: str,
    value: Callable[[Target], int | None],
    expected_version: int | None = None,
) -> list[Change]:
    """Set ``field`` of every target, or of none.

    Raises:
        CtlError: a ledger refuses; the ones changed before have their old value again.
    """
    done: list[Change] = []
    for target in targets:
        new = value(target)
        try:
            version = _set(ledgers, target, field, new, expected_version)
        except (ValueError, VmmError) as error:
            kept = _put_back(ledgers, done)
            raise CtlError("\n".join([f"{target.label}: {error}", *kept])) from None
        old: int | None = getattr(target.member, field)
        done.append(Change(_observed(target, version), field, old, new, version))
    return done


def _set(
    ledgers: Ledgers, target: Target, field: str, value: int | None, expected: int | None
) -> int:
    ledger = ledgers.ledger(target.frame.path)
    number: dict[str, int] = {field: UNBOUNDED if value is None else value}
    slot, generation = target.member.slot, target.member.generation
    return ledger.set_policy(slot, generation, expected_version=expected, **number)


def _put_back(ledgers: Ledgers, done: Sequence[Change]) -> list[str]:
    lines = []
    for earlier in done:
        target = earlier.request.target
        try:
            # Only if nobody else changed it since.
            _set(ledgers, target, earlier.field, earlier.old, earlier.version)
            lines.append(f"{target.label}: has its old value again")
        except (ValueError, VmmError) as error:
            lines.append(f"{target.label}: keeps the new value ({error})")
    return lines


def _observed(target: Target, version: int) -> Request:
    return Request(target, lambda info: info.observed_version >= version, target.member)


@dataclass(frozen=True, slots=True)
class Trim:
    """A request to give back unused memory."""

    request: Request
    version: int
    wanted: int | None
    """Bytes; None is all that is unused."""

    @property
    def given(self) -> int:
        # What left the lease, less what the member took meanwhile; a busy one counts for itself.
        before, after = self.request.target.member, self.request.latest
        counted = _reclaimed(after) - _reclaimed(before)
        return max(before.leased - after.leased, counted, 0)

    @property
    def short(self) -> int:
        """Bytes asked for that the member could not give."""
        if self.wanted is None or not self.request.acknowledged:
            return 0
        return max(0, self.wanted - self.given)

    def describe(self) -> str:
        state = "" if self.request.acknowledged else ", and is not done yet"
        return (
            f"{self.request.target.label}: gave back {format_size(self.given)}{state}; "
            f"it holds {format_size(self.request.latest.leased)}"
        )

    def as_json(self) -> dict[str, Any]:
        return _identity(self.request) | {
            "version": self.version,
            "wanted_bytes": self.wanted,
            "given_bytes": self.given,
            "leased_bytes": self.request.latest.leased,
        }


def trim(
    ledgers: Ledgers, targets: Sequence[Target], wanted: int | None, cached: bool
) -> list[Trim]:
    """Ask every target to give back; see Ledger.trim."""
    trims = []
    for target in targets:
        ledger: Ledger = ledgers.ledger(target.frame.path)
        slot, generation = target.member.slot, target.member.generation
        try:
            version = ledger.trim(slot, generation, -1 if wanted is None else wanted, cached)
        except (ValueError, VmmError) as error:
            raise CtlError(f"{target.label}: {error}") from None
        latest = target.member
        with contextlib.suppress(VmmError):  # what --no-wait shows
            latest = next(
                (info for info in ledger.members() if info.generation == generation), latest
            )
        request = Request(target, lambda info: not info.trim_pending, latest)
        trims.append(Trim(request, version, wanted))
    return trims


def _reclaimed(info: MemberInfo) -> int:
    return info.counters.get("reclaimed_bytes", 0)


def _identity(request: Request) -> dict[str, Any]:
    target = request.target
    return {
        "ledger": target.frame.key,
        "slot": target.member.slot,
        "generation": target.member.generation,
        "name": target.member.name,
        "acknowledged": request.acknowledged,
        "gone": request.gone,
    }
