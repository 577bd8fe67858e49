# SPDX-License-Identifier: Apache-2.0
"""Watches a ledger, and what the kernel says about the memory behind it."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from kvcached_core import Ledger
from kvcached_core._core import VmmError


@dataclass(frozen=True)
class Sample:
    """A ledger at one moment; bytes by member name."""

    at: float
    leased: dict[str, int]
    committed: dict[str, int]

    @property
    def total_leased(self) -> int:
        return sum(self.leased.values())


def read(ledger: Ledger) -> Sample:
    """One sample of the members that are alive."""
    # One read of the list for both numbers; they are two moments of a moving account all the same.
    members = [member for member in ledger.members() if member.alive]
    return Sample(
        time.monotonic(),
        {member.name: member.leased for member in members},
        {member.name: member.committed for member in members},
    )


def _open(path: Path) -> Ledger | None:
    """The ledger, unless the engine that makes the file is about to fill it."""
    try:
        return Ledger(path)
    except VmmError as error:
        if "unfinished" in str(error):
            return None
        raise


class LedgerWatch:
    """A thread that samples a ledger from the moment its file exists."""

    def __init__(self, path: Path, period_s: float = 0.003) -> None:
        self.path = path
        self.samples: list[Sample] = []
        self.capacity = 0
        self._period_s = period_s
        self._stop = threading.Event()
        self._ended = 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="ledger-watch", daemon=True)

    def _guarded(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # Shown by the thread that asked for the samples.
            self._error = error

    def _watch(self) -> None:
        ledger: Ledger | None = None
        while not self._stop.wait(self._period_s):
            if ledger is not None:
                self.samples.append(read(ledger))
            elif self.path.exists():
                ledger = _open(self.path)
                self.capacity = ledger.capacity if ledger is not None else 0

    def __enter__(self) -> LedgerWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = time.monotonic()
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    @property
    def blind_s(self) -> float:
        """The longest time in which it did not look."""
        return longest_pause([*(sample.at for sample in self.samples), self._ended])

    def peak_committed(self, name: str | None = None) -> int:
        """The most bytes one member, or all together, had committed at once."""
        return max((_amount(s.committed, name) for s in self.samples), default=0)

    def peak_leased(self, name: str | None = None) -> int:
        """The most bytes one member, or all together, held leases for at once."""
        return max((_amount(s.leased, name) for s in self.samples), default=0)


def _amount(by_name: dict[str, int], name: str | None) -> int:
    return sum(by_name.values()) if name is None else by_name.get(name, 0)


class RealMemory:
    """A thread that watches how much memory the kernel holds for a server's pages."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        # Looked for once: a look at all files takes long on a busy machine.
        self._files = page_files(process_tree(pid))
        self._looked: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, size_on_host(self._files))
            self._looked.append(time.monotonic())

    def __enter__(self) -> RealMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._looked.append(time.monotonic())
        self._stop.set()
        self._thread.join()

    @property
    def blind_s(self) -> float:
        """The longest time in which it did not look."""
        return longest_pause(self._looked)


def longest_pause(looked: Sequence[float]) -> float:
    return max((after - before for before, after in itertools.pairwise(looked)), default=math.inf)


@dataclass(frozen=True)
class Peaks:
    """The most that was seen, in bytes, and the longest time in which nobody looked."""

    seen: Sequence[int]
    blind_s: float


def check_peaks(run: Callable[[], Peaks], least: int, most: int, lasting_s: float = 0.1) -> None:
    """All peaks of a run lie between these bounds.

    A busy machine may stop whoever looks for more than a second. A run that saw too little is
    repeated, at most twice, if that hid the peak: if nobody looked for as long as it lasts.
    """
    runs = []
    for _ in range(3):
        peaks = run()
        runs.append(peaks)
        assert max(peaks.seen) <= most, f"more than {most}: {runs}"
        if min(peaks.seen) >= least:
            return
        assert peaks.blind_s >= lasting_s, f"never {least}: {runs}"
    raise AssertionError(f"never {least}, nor watched: {runs}")


def page_memory(pids: Iterable[int]) -> int:
    """Bytes the kernel holds for the host pages of these processes.

    The pages of a host backend lie in one anonymous file, which is sparse: its blocks are
    exactly the pages that exist.
    """
    return size_on_host(page_files(pids))


def page_files(pids: Iterable[int]) -> list[Path]:
    """Where the host pages of these processes lie."""
    found: dict[int, Path] = {}
    for pid in pids:
        try:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                if str(entry.readlink()).startswith("/memfd:kvcached"):
                    found[entry.stat().st_ino] = entry
        except FileNotFoundError:
            continue  # The process, or the file, is gone: it holds nothing.
    return list(found.values())


def size_on_host(files: Iterable[Path]) -> int:
    """Bytes the kernel holds for files, those that are gone counted as none."""
    size = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_blocks * 512
    return size


def process_tree(pid: int) -> list[int]:
    """A process and everything it started."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Waits for a condition, and fails with `what` if it does not come."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
