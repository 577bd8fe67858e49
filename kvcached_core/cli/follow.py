# SPDX-License-Identifier: Apache-2.0
"""The events of several ledgers in the order they happened."""

from __future__ import annotations

from .._core import LedgerEvent, VmmError
from .frames import Ledgers


class EventReader:
    """Reads each event once, also of ledgers that appear or are replaced later."""

    def __init__(self, ledgers: Ledgers, since: int = 0) -> None:
        self._ledgers = ledgers
        self._since = since
        self._seen: dict[tuple[str, float], int] = {}

    def read(self) -> list[tuple[str, LedgerEvent]]:
        """What happened since the last call, with the key of its ledger."""
        found: list[tuple[str, LedgerEvent]] = []
        for frame in self._ledgers.frames():
            if frame.error is not None:
                continue
            identity = (frame.key, frame.created)
            seen = self._seen.get(identity, self._since)
            try:
                entries = self._ledgers.ledger(frame.path).events(seen)
            except VmmError:
                continue  # deleted since; the next frame knows
            fresh = [entry for entry in entries if entry.seq > seen]
            self._seen[identity] = max((entry.seq for entry in fresh), default=seen)
            found += [(frame.key, entry) for entry in fresh]
        return sorted(found, key=lambda item: item[1].time)
