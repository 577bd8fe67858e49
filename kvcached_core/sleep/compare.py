# SPDX-License-Identifier: Apache-2.0
"""Whether weights on a device are those of a copy on the host, byte by byte.

Bytes cross the bus as fast one way as the other. What differs is who compares: a GPU does at the
speed of its memory, a core of the host took 10 s for the 15 GiB of an 8B model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._core import Backend, same_bytes
from .host_file import HostFile

PIECE = 64 << 20
"""Bytes compared at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """A range of device memory: one allocation of the engine's."""

    address: int
    num_bytes: int


Compare = Callable[[Sequence[Part], int], bool]
"""Whether parts are what lies at an address of the host, one part after the other."""


def pieces(parts: Sequence[Part], address: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of at most ``PIECE`` bytes: on the device, on the host, and how many bytes."""
    for part in parts:
        for begin in range(0, part.num_bytes, PIECE):
            yield part.address + begin, address + begin, min(PIECE, part.num_bytes - begin)
        address += part.num_bytes


class CompareOnHost:
    """Fetches the device's bytes and compares them with a core.

    Args:
        backend: the device.
        directory: where the copies lie.
    """

    def __init__(self, backend: Backend, directory: Path) -> None:
        self._backend = backend
        self._directory = directory

    def __call__(self, parts: Sequence[Part], address: int) -> bool:
        with self._scratch(max(part.num_bytes for part in parts)) as scratch:
            return all(
                self._same(scratch, device, host, size)
                for device, host, size in pieces(parts, address)
            )

    def _same(self, scratch: int, device: int, host: int, size: int) -> bool:
        self._backend.download(scratch, device, size)
        self._backend.finish_copies()
        return same_bytes(scratch, host, size)

    @contextmanager
    def _scratch(self, longest: int) -> Iterator[int]:
        file = HostFile.create(self._directory, min(PIECE, longest))
        try:
            self._backend.pin(file.address, file.num_bytes)
            try:
                yield file.address
            finally:
                self._backend.finish_copies()
                self._backend.unpin(file.address)
        finally:
            file.close()


class CompareOnDevice:
    """Sends the copy to the device, where the framework compares it.

    Args:
        backend: the device, the framework's current one.
        otherwise: compares if the device has no room for a piece.
    """

    def __init__(self, backend: Backend, otherwise: Compare) -> None:
        self._backend = backend
        self._otherwise = otherwise

    def __call__(self, parts: Sequence[Part], address: int) -> bool:
        torch = sys.modules["torch"]
        # What the engine computes is done (Group.sleep), and the framework's own copies too.
        try:
            scratch = torch.empty(PIECE, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            return all(
                self._same(scratch, device, host, size)
                for device, host, size in pieces(parts, address)
            )
        except torch.OutOfMemoryError:
            return self._otherwise(parts, address)
        finally:
            self._backend.finish_copies()

    def _same(self, scratch: Any, device: int, host: int, size: int) -> bool:
        torch = sys.modules["torch"]
        self._backend.upload(scratch.data_ptr(), host, size)
        self._backend.finish_copies()
        weights = torch.as_tensor(_Bytes(device, size), device=scratch.device)
        words = torch.int64 if size % 8 == 0 else torch.uint8
        # It returns once the device is done, so the next piece may overwrite this one.
        return bool(torch.equal(weights.view(words), scratch[:size].view(words)))


class _Bytes:
    """Device memory as the protocol describes it by which frameworks share arrays."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
