# SPDX-License-Identifier: Apache-2.0
"""Engines that want the same memory: who goes on, and who lets the others go first.

The ledger's plan leaves engines alone that hold equal parts.  Where each of them needs more than
that, somebody has to give way, or none of them would ever have enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from .accounts import Accounts

_GIVE_WAY_S = 1.0
"""How long an engine that stands still keeps what it holds, while another one does as well."""
_STAND_BACK_S = 1.0
"""For how long it lets the others go first then: what it gave is not enough for two."""
_LOST_S = 0.05
"""The same for one that lost the only request it ran; twice as long each time, and longer the more
members come before it in the ledger's table."""
_MOST_LOSSES = 5
_WAITED_S = 1.0
"""For how long others that waited for memory are taken to want it still."""


class Rivals:
    """Follows an engine pass by pass: :meth:`begin`, :meth:`look` unless it is quiet, :meth:`end`.

    Args:
        accounts: of the engine.
        give_all: gives back all that no request uses.
    """

    def __init__(self, accounts: Accounts, give_all: Callable[[], None]) -> None:
        self._accounts = accounts
        self._give_all = give_all
        self._running: Sequence[object] = ()
        self._ran = False
        self._contended = False
        self._waited_until = -math.inf
        self._still_since: float | None = None
        self._back_until = -math.inf
        self._stands_back = False
        self._turned_away = False
        self._losses = 0

    def begin(self, running: Sequence[object]) -> None:
        """A pass begins; ``running`` loses what the engine preempts in it."""
        self._running = running
        self._ran = bool(running)

    def look(self, now: float, contended: bool) -> None:
        """What there is to see: whether others wait for memory."""
        self._contended = contended
        if contended:
            self._waited_until = now + _WAITED_S
        self._stands_back = now < self._back_until

    def turns_away(self, running: bool) -> bool:
        """Whether a request has to wait although there may be memory: another engine's turn."""
        turned_away = self._stands_back and not running
        self._turned_away |= turned_away
        return turned_away

    def end(self, still: bool) -> bool:
        """The pass is over; whether it turned a request away.

        Args:
            still: whether nothing runs for want of memory.
        """
        self._note_still(still and self._contended)
        if still and self._ran and not self._running:
            self._note_lost()
        turned_away, self._turned_away = self._turned_away, False
        return turned_away

    def _note_still(self, still: bool) -> None:
        # If all hold equal parts, nobody is asked for any: one after the other they give up all
        # that no request uses, and stand back, until somebody has enough.
        if not still:
            self._still_since = None
            return
        now = time.monotonic()
        if self._still_since is None:
            self._still_since = now
        elif now - self._still_since >= _GIVE_WAY_S * (1 + self._accounts.waiting_behind()):
            self._still_since = now
            if self._accounts.rivals_wait():  # not for those that rank after it
                self._back_until = now + _STAND_BACK_S
            self._give_all()

    def _note_lost(self) -> None:
        # Engines that preempt the only request they run in turns, each in the middle of a long
        # prompt, would all begin anew for ever. So the first in the ledger's table goes on as it
        # likes, and others leave it more and more time to finish.
        now = time.monotonic()
        if now >= self._waited_until:
            return
        if now - self._back_until > _LOST_S * 2**_MOST_LOSSES:
            self._losses = 0
        self._losses = min(self._losses + 1, _MOST_LOSSES)
        self._back_until = now + _LOST_S * 2**self._losses * min(self._accounts.rivals_before(), 3)
        if now < self._back_until:
            self._give_all()
