# SPDX-License-Identifier: Apache-2.0
"""``kvctl delete``: the dead, their weights, and ledgers nobody uses; never what lives."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._core import Ledger, VmmError
from ..config import WEIGHTS
from ..sleep.host_file import sweep
from .errors import CtlError
from .frames import LedgerFrame, Ledgers
from .options import read
from .select import Target, matching, pick


@dataclass(slots=True)
class Deleted:
    """What a deletion did."""

    members: list[Target] = field(default_factory=list)
    ledgers: list[str] = field(default_factory=list)
    kept: list[LedgerFrame] = field(default_factory=list)


def delete_member(ledgers: Ledgers, name: str) -> Deleted:
    """Free the slot of a dead member; the other dead of its ledger go with it.

    Raises:
        CtlError: it lives, or there is none.
    """
    frames = read(ledgers)
    found = matching(frames, name)
    living = [target for target in found if target.member.alive]
    if living:
        who = ", ".join(f"{target.label}, pid {target.member.pid}," for target in living)
        raise CtlError(f"{who} is alive: stop it first, or `kvctl trim {name}` to free its memory")
    if not found:
        pick(frames, name)  # says what there is
    deleted = Deleted()
    for frame in frames:
        if any(target.frame is frame for target in found):
            deleted.members += _reap(ledgers, frame)
    _sweep(ledgers)
    return deleted


def delete_unused(ledgers: Ledgers) -> Deleted:
    """Free the slots of all dead members, and delete the ledgers without a living one.

    Raises:
        CtlError: the one ledger that was named is in use, or there is none at all.
    """
    deleted = Deleted()
    _sweep(ledgers)
    for frame in read(ledgers):
        if frame.error is None:
            deleted.members += _reap(ledgers, frame)
        if frame.living:
            deleted.kept.append(frame)
            continue
        try:
            Ledger.remove(frame.path)
        except VmmError as error:
            if frame.error is None and ledgers.key is None:
                deleted.kept.append(frame)  # a member joined meanwhile
                continue
            raise CtlError(str(error)) from None
        deleted.ledgers.append(frame.key)
    if ledgers.key is not None and deleted.kept:
        names = ", ".join(member.name for frame in deleted.kept for member in frame.living)
        raise CtlError(f"ledger {ledgers.key} is in use by {names}: stop them first")
    return deleted


def _sweep(ledgers: Ledgers) -> None:
    # Where they are unless KVCACHED_WEIGHTS_DIR says otherwise: there the next engine does it.
    sweep(ledgers.directory / WEIGHTS)


def _reap(ledgers: Ledgers, frame: LedgerFrame) -> list[Target]:
    try:
        return [Target(frame, info) for info in ledgers.ledger(frame.path).reap()]
    except VmmError as error:
        raise CtlError(str(error)) from None
