# SPDX-License-Identifier: Apache-2.0
"""From what an operator calls a member to its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._core import MemberInfo
from .errors import CtlError
from .frames import LedgerFrame
from .values import printable


@dataclass(frozen=True, slots=True)
class Target:
    """A member in a ledger."""

    frame: LedgerFrame
    member: MemberInfo

    @property
    def label(self) -> str:
        return f"{printable(self.member.name)} ({self.frame.key} #{self.member.slot})"


def matching(frames: Sequence[LedgerFrame], name: str) -> list[Target]:
    """Members, dead ones too, with that name or, for ``#3``, in that slot."""
    return [
        Target(frame, member)
        for frame in frames
        for member in frame.members
        if (f"#{member.slot}" == name if is_slot(name) else member.name == name)
    ]


def is_slot(name: str) -> bool:
    return name.startswith("#") and name[1:].isdecimal()


def only(frames: Sequence[LedgerFrame], wanted: Sequence[str]) -> list[LedgerFrame]:
    """The ledgers that have one of these members, to show no other one."""
    if not wanted:
        return list(frames)
    found = (replace(frame, only=tuple(wanted)) for frame in frames)
    return [frame for frame in found if frame.shown]


def pick(frames: Sequence[LedgerFrame], name: str) -> list[Target]:
    """The living member ``name`` in each ledger that has it.

    Raises:
        CtlError: there is none, or it is not clear which.
    """
    found = matching(frames, name)
    living = [target for target in found if target.member.alive]
    if not living:
        raise CtlError(_absent(frames, name, found))
    if is_slot(name):
        if len(living) > 1:
            raise CtlError(
                f"several ledgers have a member in slot {name}: {_labels(living)}. "
                "Name one of the ledgers with --ledger"
            )
        return living
    for frame in frames:
        here = [target for target in living if target.frame is frame]
        if len(here) > 1:
            slots = " or ".join(f"'#{target.member.slot}'" for target in here)
            raise CtlError(
                f"{len(here)} living members of {frame.key} are named {name!r}: {_labels(here)}. "
                f"Say {slots} instead, with --ledger {frame.key}"
            )
    return living


def no_ledgers(directory: object, key: str | None) -> str:
    what = "no ledger" if key is None else f"no ledger {key!r}"
    return (
        f"{what} in {directory}: start an engine with kvcached, or name the directory with "
        "--ledger-dir or KVCACHED_LEDGER_DIR"
    )


def _absent(frames: Sequence[LedgerFrame], name: str, dead: Sequence[Target]) -> str:
    if dead:
        return (
            f"{_labels(dead)} is dead: start its engine again. Its bytes return with the next "
            f"lease of another engine, or with `kvctl delete {name}`"
        )
    known = sorted({printable(member.name) for frame in frames for member in frame.living})
    message = f"no member {name!r}: "
    message += f"there are {', '.join(known)}" if known else "no ledger has a living member"
    return "\n".join([message, *(frame.error for frame in frames if frame.error)])


def _labels(targets: Sequence[Target]) -> str:
    return ", ".join(f"{target.label}, pid {target.member.pid}" for target in targets)
