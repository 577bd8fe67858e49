# SPDX-License-Identifier: Apache-2.0
"""Room for the weights of an engine that is to wake, out of what others may have to give back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from .._core import Ledger, LedgerRefused, Member
from ..units import format_size

_LOOK_MS = 20
"""How often to look without a bell: foreign memory that is freed rings none."""

CANNOT_WAKE = "kvcached cannot wake"
"""How the message of a :class:`WakeRefused` begins, in whatever an engine wraps it."""
_WAKING = " waking"


def is_waking(member: str) -> bool:
    """Whether a member of that name leases for an engine that wakes."""
    return member.endswith(_WAKING)


class WakeRefused(RuntimeError):
    """There is no room for the weights now; the message says who holds it, and what to do."""


class WakeLease:
    """Bytes leased for one engine that is about to wake, in one ledger.

    By a member of its own, which is there for as long as the wake takes: the engine's limit and
    guarantee are about its KV cache, and say nothing about its weights.

    Args:
        ledger: of the device.
        owner: the engine's member; its weight and priority rank this.
        num_bytes: to be leased.
    """

    def __init__(self, ledger: Ledger, owner: Member, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._ledger = ledger
        self._owner = owner
        self._name = owner.info().name
        policy = owner.policy()
        try:
            self._member = ledger.join(
                self._name[:80] + _WAKING, weight=policy.weight, priority=policy.priority
            )
        except LedgerRefused as error:
            raise WakeRefused(f"{CANNOT_WAKE} {self._name}: {error}") from None

    def wait(self, deadline: float, look: Callable[[], object]) -> None:
        """Lease, while others give back what they do not need.

        Args:
            deadline: of the monotonic clock.
            look: publishes what the driver says is in use.

        Raises:
            WakeRefused: they did not give enough in time.
        """
        begin = time.monotonic()
        heard = self._member.bell
        try:
            while not self._member.lease(self.num_bytes):
                left_ms = math.ceil((deadline - time.monotonic()) * 1000)
                if left_ms <= 0:
                    raise WakeRefused(self._explain(time.monotonic() - begin))
                self._member.set_demand(self.num_bytes, 1)
                # Plans anew: who does not answer is passed over, and others are asked.
                self._member.ask()
                heard = self._member.wait_bell(heard, min(left_ms, _LOOK_MS))
                look()
        finally:
            self._member.set_demand(0)
        # As an engine's pages, or the driver's totals would count them a second time as they come;
        # and before they have come they hide nothing else that is in use.
        self._member.set_unmapped(self.num_bytes)
        self._member.add_committed(self.num_bytes)
        self._member.set_pinned(self.num_bytes)
        self._owner.time("wait", time.monotonic() - begin)

    def hand_over(self, num_bytes: int) -> None:
        """They are there: from now on they are weights of the engine."""
        self._owner.adopt(self._member, num_bytes)

    def close(self) -> None:
        """Give back what was not handed over."""
        self._member.leave()

    def _explain(self, waited_s: float) -> str:
        own = self._member.slot
        held = ", ".join(
            f"{member.name} {format_size(member.leased + member.static_bytes)}"
            for member in self._ledger.members()
            if member.alive and member.slot != own and member.leased + member.static_bytes
        )
        return (
            f"{CANNOT_WAKE} {self._name}: it needs {format_size(self.num_bytes)} of "
            f"{self._ledger.path}, and {format_size(self._member.claimable())} are free for it "
            f"after {waited_s:.1f} s; held by {held or 'no member'}. Put another engine to sleep "
            "or stop it, lower a guarantee (kvctl), or raise KVCACHED_WAKE_WAIT_MS"
        )


def lease_all(
    wanted: Sequence[tuple[Ledger, Member, int]], timeout_s: float, look: Callable[[], object]
) -> list[WakeLease]:
    """Lease in every ledger, or in none.

    Args:
        wanted: ledger, the engine's member there, and bytes.
        timeout_s: for all of them together.
        look: publishes what the driver says is in use.

    Raises:
        WakeRefused: the bytes are not there, and nobody gave them in time.
    """
    deadline = time.monotonic() + timeout_s
    leases: list[WakeLease] = []
    try:
        # In one order for all engines: two that wake must not wait for each other's halves.
        for ledger, member, num_bytes in sorted(wanted, key=lambda item: item[0].path):
            if num_bytes:
                lease = WakeLease(ledger, member, num_bytes)
                leases.append(lease)
                lease.wait(deadline, look)
    except BaseException:
        for lease in leases:
            lease.close()
        raise
    return leases
