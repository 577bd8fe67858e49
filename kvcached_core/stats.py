# SPDX-License-Identifier: Apache-2.0
"""What an engine's metrics tell of its memory."""

from __future__ import annotations

from .accounts import Accounts
from .metrics import HISTOGRAMS, HistogramFeed

_OF_MEMBERS = ("leased", "committed", "parked", "cached", "guarantee", "demand")


class Stats:
    """Sums over the ledgers that an engine is in; times are told once.

    Args:
        accounts: of the engine.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._feed = HistogramFeed()

    def read(self) -> dict[str, float | list[float]]:
        """Bytes over all ledgers, and the times since the last call that
        :data:`~kvcached_core.metrics.HISTOGRAMS` names, in seconds.
        """
        names = ("capacity", "available", *_OF_MEMBERS, "limit", "asked")
        totals = dict.fromkeys(names, 0.0)
        times: dict[str, float | list[float]] = {name: [] for name in HISTOGRAMS}
        for index, account in enumerate(self._accounts):
            info = account.member.info()
            totals["capacity"] += account.ledger.capacity
            totals["available"] += account.member.claimable()
            totals["limit"] += account.ledger.capacity if info.limit is None else info.limit
            for name in _OF_MEMBERS:
                totals[name] += getattr(info, name)
            totals["asked"] += info.asked + info.asked_running
            # Passes are those of the engine, and timed alike in all its ledgers.
            for kind, histogram in info.histograms.items() if index == 0 else ():
                times[f"{kind}_seconds"] = self._feed.new_values(kind, histogram.counts)
        return {f"{name}_bytes": value for name, value in totals.items()} | times
