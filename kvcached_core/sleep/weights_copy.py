# SPDX-License-Identifier: Apache-2.0
"""The bytes of weights on the host, while the device does without them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from .._core import Backend
from .compare import Compare, CompareOnDevice, CompareOnHost, Part, Piece, laid_out
from .host_file import HostFile, sweep

_CHANGES = 8
"""More changed than one byte in so many is a copy of its own."""


class WeightsCopy:
    """A copy on the host, in memory locked for the device, in the order of the parts.

    Engines with equal weights have one copy together: the first to sleep publishes it under the
    key, the next one finds it, compares every byte, and has beside it only what is not the same.
    Some is once an engine has served: not all in a pool of weights is weights.  An engine whose
    weights are others after all has a copy of its own.

    Args:
        backend: the device.
        directory: where the copy lies.
        key: the same for engines whose weights may be equal; None for a copy nobody shares.
        resident: whether its pages are to stay in memory, from which a device can read them.
        compare: finds what is not the same; a core of the host, unless told otherwise.
    """

    def __init__(
        self,
        backend: Backend,
        directory: Path,
        key: str | None,
        *,
        resident: bool = True,
        compare: Compare | None = None,
    ) -> None:
        self._backend = backend
        self._directory = directory
        self._key = key
        self._resident = resident
        self._compare = compare or CompareOnHost(backend, directory)
        self._file: HostFile | None = None
        self._changed: list[Piece] = []
        self._changes: HostFile | None = None
        """What changed since, one piece after the other."""

    @property
    def _files(self) -> list[HostFile]:
        return [file for file in (self._file, self._changes) if file is not None]

    @property
    def num_bytes(self) -> int:
        """Bytes on the host now."""
        return sum(file.num_bytes for file in self._files)

    @property
    def path(self) -> Path | None:
        return None if self._file is None else self._file.path

    @property
    def changed_bytes(self) -> int:
        """Of the latest copy, those that are not in the file others may use."""
        return sum(piece.num_bytes for piece in self._changed)

    def save(self, parts: Sequence[Part]) -> None:
        """Have the parts' bytes on the host.

        Raises:
            OSError: there is no room for them.
            VmmError: the device refused.
        """
        self._save(parts)
        if not self._resident:
            for file in self._files:
                file.let_go()

    def _save(self, parts: Sequence[Part]) -> None:
        size = sum(part.num_bytes for part in parts)
        if self._file is not None and self._file.num_bytes == size and self._save_changes(parts):
            return
        self.drop()
        if not size:
            return
        sweep(self._directory)
        if self._key is not None:
            shared = HostFile.open(self._directory, self._key, size)
            if shared is not None:
                self._file = self._pinned(shared)
                if self._save_changes(parts):
                    return
                self.drop()
        self._file = self._pinned(HostFile.create(self._directory, size))
        try:
            self._download(self._file, laid_out(parts))
            if self._key is not None:
                self._file.publish(self._key)
        except BaseException:
            self.drop()
            raise

    def _save_changes(self, parts: Sequence[Part]) -> bool:
        """Whether little enough has changed to be kept beside the file, and then is."""
        assert self._file is not None
        most = self._file.num_bytes // _CHANGES
        changed = self._compare(parts, self._file.address, most)
        if changed is None:
            return False
        size = sum(piece.num_bytes for piece in changed)
        if self._changes is not None and self._changes.num_bytes < size:
            self._give_up(self._changes)
            self._changes = None
        if size and self._changes is None:
            self._changes = self._pinned(HostFile.create(self._directory, size))
        self._changed = changed
        if self._changes is not None:
            self._download(self._changes, _one_after_the_other(changed))
        return True

    def restore(self, parts: Sequence[Part]) -> None:
        """Queue the copies back, in the order of the parts; the copy stays until they are done.

        Raises:
            VmmError: the device refused.
        """
        assert self._file is not None or not parts
        for file, pieces in (
            (self._file, laid_out(parts)),
            (self._changes, _one_after_the_other(self._changed)),
        ):
            for piece in pieces:
                assert file is not None
                self._backend.upload(piece.address, file.address + piece.offset, piece.num_bytes)

    def drop(self) -> None:
        """Give up the copy."""
        files = self._files
        self._file = self._changes = None
        self._changed = []
        for file in files:
            self._give_up(file)

    def _give_up(self, file: HostFile) -> None:
        self._backend.finish_copies()
        self._backend.unpin(file.address)
        file.close()

    def _pinned(self, file: HostFile) -> HostFile:
        try:
            self._backend.pin(file.address, file.num_bytes)
        except BaseException:
            file.close()
            raise
        return file

    def _download(self, file: HostFile, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self._backend.download(file.address + piece.offset, piece.address, piece.num_bytes)
        self._backend.finish_copies()


def copy_of_engine(backend: Backend, directory: Path, key: str | None, kind: str) -> WeightsCopy:
    """A copy of what an engine has on its device, in the way that suits a kind of device.

    Args:
        backend: the device.
        directory: where the copy lies.
        key: as of :class:`WeightsCopy`.
        kind: of the device: ``host`` or a GPU's.
    """
    if kind == "host":
        return WeightsCopy(backend, directory, key, resident=False)
    compare = CompareOnDevice(backend, CompareOnHost(backend, directory))
    return WeightsCopy(backend, directory, key, compare=compare)


def _one_after_the_other(pieces: Iterable[Piece]) -> Iterable[Piece]:
    offset = 0
    for piece in pieces:
        yield Piece(piece.address, offset, piece.num_bytes)
        offset += piece.num_bytes


def fingerprint(*items: object) -> str:
    """A key for engines whose items are equal; it only has to be likely that the weights are."""
    return hashlib.sha256(repr(items).encode()).hexdigest()[:32]
