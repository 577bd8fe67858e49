# SPDX-License-Identifier: Apache-2.0
"""The ledgers of a directory at one moment, read without changing them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .._core import Ledger, MemberInfo, VmmError
from .errors import CtlError

SUFFIX = ".ledger"


@dataclass(frozen=True, slots=True)
class LedgerFrame:
    """One ledger at one moment. With ``error`` set nothing else but key and path is known."""

    key: str
    path: Path
    capacity: int = 0
    headroom: int = 0
    external: int = 0
    told: bool = False
    created: float = 0.0
    members: tuple[MemberInfo, ...] = ()
    error: str | None = None
    only: tuple[str, ...] = ()
    """Names or slots of the members to show; all of them if empty."""
    taken: float = field(default_factory=time.time)

    @property
    def leased(self) -> int:
        return sum(member.leased for member in self.members)

    @property
    def committed(self) -> int:
        return sum(member.committed for member in self.members)

    @property
    def parked(self) -> int:
        return sum(member.parked for member in self.members)

    @property
    def cached(self) -> int:
        return sum(member.cached for member in self.members)

    @property
    def non_kv(self) -> int:
        """Bytes that are no lease, in use or promised: other processes, weights, workspace."""
        static = sum(member.static_bytes for member in self.members)
        if not self.told:
            return static
        to_come = sum(member.to_come for member in self.members)
        guessed = sum(member.guessed for member in self.members)
        return max(self.external + to_come, static - guessed)

    # As Ledger.available and overdraft have it. Those reap the dead first, and a look must not:
    # here all numbers of a frame come from one reading, the dead that still hold leases included.
    @property
    def _spare(self) -> int:
        return self.capacity - self.headroom - self.non_kv - self.leased

    @property
    def available(self) -> int:
        return max(0, self._spare)

    @property
    def overdraft(self) -> int:
        return max(0, -self._spare)

    @property
    def shown(self) -> tuple[MemberInfo, ...]:
        """The members to show; sums are over all of them in any case."""
        if not self.only:
            return self.members
        return tuple(member for member in self.members if names(member, self.only))

    @property
    def living(self) -> tuple[MemberInfo, ...]:
        return tuple(member for member in self.members if member.alive)


def names(member: MemberInfo, wanted: Sequence[str]) -> bool:
    """Whether one of ``wanted`` is its name, or its slot as ``#3``."""
    return member.name in wanted or f"#{member.slot}" in wanted


class Ledgers:
    """The ledgers of one directory, or the one named ``key``; each is opened once."""

    def __init__(self, directory: Path, key: str | None = None) -> None:
        self.directory = directory
        self.key = key
        self._open: dict[Path, tuple[tuple[int, int], Ledger]] = {}

    def paths(self) -> list[Path]:
        """Ledger files there are now, by name.

        Raises:
            CtlError: the directory is another user's.
        """
        if self.directory.exists() and not os.access(self.directory, os.R_OK | os.X_OK):
            raise CtlError(
                f"{self.directory} belongs to user {self.directory.stat().st_uid}: run kvctl as "
                "that user"
            )
        if self.key is not None:
            path = self.path(self.key)
            return [path] if path.exists() or path.is_symlink() else []
        return sorted(self.directory.glob(f"*{SUFFIX}"))

    def path(self, key: str) -> Path:
        return self.directory / f"{key}{SUFFIX}"

    def ledger(self, path: Path) -> Ledger:
        """Open ``path``, anew if another file has its name now.

        Raises:
            VmmError: it is no ledger, or not for us; the message names the remedy.
        """
        try:
            status = path.lstat()
            identity = (status.st_dev, status.st_ino)
        except OSError:
            identity = (0, 0)  # Ledger says what is wrong
        known = self._open.get(path)
        if known is None or known[0] != identity:
            known = self._open[path] = (identity, Ledger(path))
        return known[1]

    def frames(self) -> list[LedgerFrame]:
        """All ledgers now; those that cannot be read say why."""
        paths = self.paths()
        for gone in self._open.keys() - set(paths):
            del self._open[gone]
        return [self.frame(path) for path in paths]

    def frame(self, path: Path) -> LedgerFrame:
        key = path.name.removesuffix(SUFFIX)
        try:
            ledger = self.ledger(path)
            members = tuple(ledger.members())
        except VmmError as error:
            self._open.pop(path, None)
            return LedgerFrame(key, path, error=str(error))
        return LedgerFrame(
            key,
            path,
            capacity=ledger.capacity,
            headroom=ledger.headroom,
            external=ledger.external,
            told=ledger.told,
            created=ledger.create_time,
            members=members,
        )
