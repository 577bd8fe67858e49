# SPDX-License-Identifier: Apache-2.0
"""Waiting until members have done what was asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._core import MemberInfo
from ..units import format_size
from .errors import TIMED_OUT, CtlError
from .frames import Ledgers
from .select import Target

_POLL_S = 0.02


@dataclass(slots=True)
class Request:
    """Something asked of a member."""

    target: Target
    done: Callable[[MemberInfo], bool]
    latest: MemberInfo
    """As last seen."""
    gone: bool = False

    @property
    def acknowledged(self) -> bool:
        return not self.gone and self.done(self.latest)


def wait(ledgers: Ledgers, requests: Sequence[Request], timeout_s: float) -> None:
    """Look at the members until all have complied or are gone, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        for request in requests:
            _look(ledgers, request)
        if all(request.gone or request.acknowledged for request in requests):
            return
        if time.monotonic() >= deadline:
            return
        time.sleep(_POLL_S)


def _look(ledgers: Ledgers, request: Request) -> None:
    key = (request.target.member.slot, request.target.member.generation)
    for info in ledgers.ledger(request.target.frame.path).members():
        if (info.slot, info.generation) == key:
            request.latest = info
            request.gone = not info.alive
            return
    request.gone = True


def require(requests: Sequence[Request], what: str, timeout_s: float) -> None:
    """Fail unless all have complied.

    Raises:
        CtlError: a member died or left (status 1), or has not complied in time (status 3).
    """
    gone = [request.target.label for request in requests if request.gone]
    if gone:
        raise CtlError(
            f"{', '.join(gone)} died or left before it complied with the {what}; its bytes return "
            "by themselves. Start its engine again to use the memory"
        )
    late = [_outstanding(request) for request in requests if not request.acknowledged]
    if late:
        raise CtlError(
            f"not acknowledged within {timeout_s:g} s, and still in force ({what}):\n"
            + "\n".join(late)
            + "\nWait longer with --timeout, or look again with `kvctl show`",
            TIMED_OUT,
        )


def _outstanding(request: Request) -> str:
    info = request.latest
    parts = []
    if info.trim_pending:
        parts.append("its trim is pending")
    if info.observed_version != info.desired_version:
        parts.append(
            f"it has observed policy version {info.observed_version} of {info.desired_version}"
        )
    over = info.leased - info.limit if info.limit is not None else 0
    if over > 0:
        parts.append(f"it holds {format_size(over)} more than its limit")
    if info.asked:
        parts.append(f"{format_size(info.asked)} are asked of it")
    if info.asked_running:
        parts.append(
            f"{format_size(info.asked_running)} more, for which running requests must be preempted"
        )
    if info.returning:
        parts.append(f"{format_size(info.returning)} are on their way back")
    parts.append(f"it last ran a step {info.idle_s:.1f} s ago")
    return f"  {request.target.label}: {'; '.join(parts)}"
