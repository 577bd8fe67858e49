# SPDX-License-Identifier: Apache-2.0
"""The bytes of weights on the host, while the device does without them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from .._core import Backend
from .compare import Compare, CompareOnDevice, CompareOnHost, Part
from .host_file import HostFile, sweep


class WeightsCopy:
    """One copy on the host, in memory locked for the device, in the order of the parts.

    Engines with equal weights have one copy together: the first to sleep publishes it under the
    key, the next one finds it and compares every byte before it relies on it.  An engine whose
    weights are others after all has a copy of its own.

    Args:
        backend: the device.
        directory: where the copy lies.
        key: the same for engines whose weights may be equal; None for a copy nobody shares.
        resident: whether its pages are to stay in memory, from which a device can read them.
        compare: how to find out whether weights are those of a copy; else a core does.
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
        self._compare = compare or CompareOnHost(backend, directory)
        self._backend = backend
        self._directory = directory
        self._key = key
        self._resident = resident
        self._file: HostFile | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on the host now."""
        return 0 if self._file is None else self._file.num_bytes

    @property
    def path(self) -> Path | None:
        return None if self._file is None else self._file.path

    def save(self, parts: Sequence[Part]) -> None:
        """Have the parts' bytes on the host.

        Raises:
            OSError: there is no room for them.
            VmmError: the device refused.
        """
        self._save(parts)
        if self._file is not None and not self._resident:
            self._file.let_go()

    def _save(self, parts: Sequence[Part]) -> None:
        size = sum(part.num_bytes for part in parts)
        if self._file is not None and self._file.num_bytes == size and self._equals(parts):
            return
        self.drop()
        if not size:
            return
        sweep(self._directory)
        if self._key is not None:
            shared = HostFile.open(self._directory, self._key, size)
            if shared is not None:
                self._take(shared)
                if self._equals(parts):
                    return
                self.drop()
        self._take(HostFile.create(self._directory, size))
        assert self._file is not None
        try:
            for part, offset in _laid_out(parts):
                self._backend.download(self._file.address + offset, part.address, part.num_bytes)
            self._backend.finish_copies()
        except BaseException:
            self.drop()
            raise
        if self._key is not None:
            self._file.publish(self._key)

    def restore(self, parts: Sequence[Part]) -> None:
        """Queue the copies back, in the order of the parts; the copy stays until they are done.

        Raises:
            VmmError: the device refused.
        """
        assert self._file is not None or not parts
        for part, offset in _laid_out(parts):
            assert self._file is not None
            self._backend.upload(part.address, self._file.address + offset, part.num_bytes)

    def drop(self) -> None:
        """Give up the copy."""
        if self._file is None:
            return
        file, self._file = self._file, None
        self._backend.finish_copies()
        self._backend.unpin(file.address)
        file.close()

    def _take(self, file: HostFile) -> None:
        try:
            self._backend.pin(file.address, file.num_bytes)
        except BaseException:
            file.close()
            raise
        self._file = file

    def _equals(self, parts: Sequence[Part]) -> bool:
        assert self._file is not None
        return self._compare(parts, self._file.address)


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


def _laid_out(parts: Sequence[Part]) -> Iterable[tuple[Part, int]]:
    """The parts and where they lie in the copy, one after the other."""
    offset = 0
    for part in parts:
        yield part, offset
        offset += part.num_bytes


def fingerprint(*items: object) -> str:
    """A key for engines whose items are equal; it only has to be likely that the weights are."""
    return hashlib.sha256(repr(items).encode()).hexdigest()[:32]
