# SPDX-License-Identifier: Apache-2.0
"""One rank's weights asleep and awake: every step happens whole, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .._core import Backend
from .compare import Part
from .weights_copy import WeightsCopy


class DeviceMemory(Protocol):
    """Memory whose addresses stay while the bytes behind them come and go."""

    @property
    def parts(self) -> Sequence[Part]:
        """What there is, in the order in which it is needed first."""

    def back(self) -> None:
        """Have memory behind all parts, or leave all as they are and raise."""

    def drop(self) -> None:
        """Give all of it to the device."""


class Group:
    """Memory that goes and comes together.

    Args:
        backend: the device.
        memory: what goes and comes.
        copy: where its content is meanwhile.
    """

    def __init__(self, backend: Backend, memory: DeviceMemory, copy: WeightsCopy) -> None:
        self._backend = backend
        self._memory = memory
        self._copy = copy
        self._kept = False
        self._restoring = False
        self.asleep = False

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._memory.parts)

    @property
    def away(self) -> int:
        """Bytes the device does without now."""
        return self.num_bytes if self.asleep else 0

    def sleep(self, keep: bool) -> None:
        """Give the memory up; with its content, unless ``keep``.

        Raises:
            OSError: the host has no room for the content; nothing has changed.
            VmmError: likewise, the device refused.
        """
        if self.asleep:
            return
        self._backend.fence()
        self.finish()
        if keep:
            self._copy.save(self._memory.parts)
        else:
            self._copy.drop()
        self._memory.drop()
        self._kept = keep
        self.asleep = True

    def wake(self) -> None:
        """Have the memory again, and its content queued; all as before if it raises.

        Raises:
            VmmError: the device refused.
            MemoryError: it has no room.
        """
        if not self.asleep:
            return
        self._memory.back()
        try:
            if self._kept:
                self._copy.restore(self._memory.parts)
                self._restoring = True
        except BaseException:
            self._backend.finish_copies()
            self._memory.drop()
            raise
        self.asleep = False

    def sleep_again(self) -> None:
        """Take back a wake: the content has not changed since."""
        if self.asleep:
            return
        self._backend.fence()
        self.finish()
        self._memory.drop()
        self.asleep = True

    def finish(self) -> None:
        """Wait for the content of the latest wake."""
        if self._restoring:
            self._backend.finish_copies()
            self._restoring = False

    def close(self) -> None:
        self._copy.drop()


class WorkerSleep:
    """What a rank can put to sleep.

    Args:
        weights: dropped without a copy by a sleep of level 2.
        others: contents nobody could load again, by the engine's tag for them.
    """

    def __init__(self, weights: Group, others: dict[str, Group]) -> None:
        self._groups = [("weights", weights, True)]
        self._groups += [(tag, group, False) for tag, group in others.items()]
        self._level = 0

    @property
    def level(self) -> int:
        """Of the sleep the weights are in, or were in last; 0 if there was none."""
        return self._level

    @property
    def num_bytes(self) -> int:
        return sum(group.num_bytes for _, group, _ in self._groups)

    def away(self) -> int:
        """Bytes the device does without now."""
        return sum(group.away for _, group, _ in self._groups)

    def away_of(self, tags: Sequence[str] | None) -> int:
        """Bytes that a wake of these tags needs."""
        return sum(group.away for tag, group, _ in self._groups if tags is None or tag in tags)

    def sleep(self, level: int) -> None:
        """Level 1 keeps all contents on the host, level 2 all but the weights.

        Raises:
            OSError: as :meth:`Group.sleep`; all are awake then.
            VmmError: likewise.
        """
        done: list[Group] = []
        try:
            for _, group, droppable in reversed(self._groups):
                if not group.asleep:
                    group.sleep(keep=level == 1 or not droppable)
                    done.append(group)
        except BaseException:
            for group in done:
                group.wake()
            raise
        self._level = level

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Have the groups of these tags back, or of all; as before if it raises.

        Raises:
            VmmError: as :meth:`Group.wake`.
            MemoryError: likewise.
        """
        done: list[Group] = []
        try:
            for tag, group, _ in self._groups:
                if group.asleep and (tags is None or tag in tags):
                    group.wake()
                    done.append(group)
        except BaseException:
            for group in done:
                group.sleep_again()
            raise

    def sleep_again(self, tags: Sequence[str] | None = None) -> None:
        """Take back the latest wake."""
        for tag, group, _ in self._groups:
            if tags is None or tag in tags:
                group.sleep_again()

    def finish(self) -> None:
        """Wait for all content of the latest wake."""
        for _, group, _ in self._groups:
            group.finish()

    def close(self) -> None:
        for _, group, _ in self._groups:
            group.close()
