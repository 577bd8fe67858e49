# SPDX-License-Identifier: Apache-2.0
"""Where memory of a device differs from a copy on the host.

Bytes cross the bus as fast one way as the other. What differs is who compares: a GPU does it at the
speed of its memory, a core of the host takes seconds for the 15 GiB of an 8B model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .._core import Backend, same_bytes
from .host_file import HostFile

BLOCK = 2 << 20
"""Bytes that differ or do not: what is told apart."""
PIECE = 64 << 20
"""Bytes fetched or sent at a time, a multiple of a block."""


@dataclass(frozen=True, slots=True)
class Part:
    """A range of device memory: one allocation of the engine's."""

    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of device memory, and where it lies in a copy of all parts, one after the other."""

    address: int
    offset: int
    num_bytes: int

    def split(self, size: int) -> Iterator[Piece]:
        for begin in range(0, self.num_bytes, size):
            yield Piece(
                self.address + begin, self.offset + begin, min(size, self.num_bytes - begin)
            )


def laid_out(parts: Iterable[Part]) -> Iterator[Piece]:
    """The parts, and where each lies in a copy."""
    offset = 0
    for part in parts:
        yield Piece(part.address, offset, part.num_bytes)
        offset += part.num_bytes


class Compare(Protocol):
    """Finds what differs."""

    def __call__(self, parts: Sequence[Part], copy: int, most: int) -> list[Piece] | None:
        """The blocks of parts that are not as in a copy at an address of the host.

        Args:
            parts: what to compare, of which there is some.
            copy: the address.
            most: bytes that may differ; if more do, the answer is None.
        """


class CompareOnHost:
    """Fetches the device's bytes and compares them with a core.

    Args:
        backend: the device.
        directory: where the copies lie.
    """

    def __init__(self, backend: Backend, directory: Path) -> None:
        self._backend = backend
        self._directory = directory

    def __call__(self, parts: Sequence[Part], copy: int, most: int) -> list[Piece] | None:
        with self._scratch(max(part.num_bytes for part in parts)) as scratch:
            return _at_most(most, (self._blocks(scratch, piece, copy) for piece in _pieces(parts)))

    def _blocks(self, scratch: int, piece: Piece, copy: int) -> list[Piece]:
        self._backend.download(scratch, piece.address, piece.num_bytes)
        self._backend.finish_copies()
        return [
            block
            for block in piece.split(BLOCK)
            if not same_bytes(
                scratch + block.offset - piece.offset, copy + block.offset, block.num_bytes
            )
        ]

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
        backend: the device, the framework's current one, on which nothing is computed meanwhile.
        otherwise: compares if the device has no room for a piece.
    """

    def __init__(self, backend: Backend, otherwise: Compare) -> None:
        self._backend = backend
        self._otherwise = otherwise

    def __call__(self, parts: Sequence[Part], copy: int, most: int) -> list[Piece] | None:
        torch = sys.modules["torch"]
        try:
            scratch = torch.empty(PIECE, dtype=torch.uint8, device="cuda")
            # It may have been in use until now.
            torch.cuda.synchronize()
            return _at_most(most, (self._blocks(scratch, piece, copy) for piece in _pieces(parts)))
        except torch.OutOfMemoryError:
            return self._otherwise(parts, copy, most)
        finally:
            self._backend.finish_copies()

    def _blocks(self, scratch: Any, piece: Piece, copy: int) -> list[Piece]:
        torch = sys.modules["torch"]
        self._backend.upload(scratch.data_ptr(), copy + piece.offset, piece.num_bytes)
        self._backend.finish_copies()
        ours = torch.as_tensor(_Bytes(piece.address, piece.num_bytes), device=scratch.device)
        theirs = scratch[: piece.num_bytes]
        words = torch.int64 if piece.num_bytes % 8 == 0 else torch.uint8
        # Both wait for the device, so the next piece may overwrite this one.
        if torch.equal(ours.view(words), theirs.view(words)):
            return []
        return [
            block
            for block, mine, other in zip(
                piece.split(BLOCK), ours.split(BLOCK), theirs.split(BLOCK), strict=True
            )
            if not torch.equal(mine, other)
        ]


class _Bytes:
    """Device memory as the protocol describes it by which frameworks share arrays."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _pieces(parts: Sequence[Part]) -> Iterator[Piece]:
    for whole in laid_out(parts):
        yield from whole.split(PIECE)


def _at_most(most: int, found: Iterable[list[Piece]]) -> list[Piece] | None:
    """All that was found, neighbours in one; None once it is too much."""
    pieces: list[Piece] = []
    for block in (block for blocks in found for block in blocks):
        most -= block.num_bytes
        if most < 0:
            return None
        last = pieces[-1] if pieces else None
        if (
            last is not None
            and last.address + last.num_bytes == block.address
            and last.offset + last.num_bytes == block.offset
        ):
            pieces[-1] = Piece(last.address, last.offset, last.num_bytes + block.num_bytes)
        else:
            pieces.append(block)
    return pieces
