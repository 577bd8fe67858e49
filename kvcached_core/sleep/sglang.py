# SPDX-License-Identifier: Apache-2.0
"""SGLang's memory saver under the ledger: its tags and endpoints, and memory of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._core import VmmError
from ..config import Config
from ..devices import open_backend
from .host_file import sweep
from .memory import MovedMemory
from .wake_lease import WakeRefused
from .weights_copy import copy_of_engine, fingerprint
from .worker_sleep import Group, WorkerSleep

if TYPE_CHECKING:
    from ..sglang import Ranks, SglangRank

TAGS = ("weights", "kv_cache", "cuda_graph")
"""SGLang's. Graphs stay: they hold no content of their own but what a capture allocated."""


class _Failed(Exception):
    """A rank could not wake; all sleep again."""


class SglangSleep:
    """One rank's part; every rank calls every method at the same time, in the same order.

    Args:
        rank: whose KV cache goes with the weights.
        ranks: of the engine.
        worker: this rank's weights.
    """

    def __init__(self, rank: SglangRank, ranks: Ranks, worker: WorkerSleep) -> None:
        self._rank = rank
        self._ranks = ranks
        self._worker = worker
        self._asleep: set[str] = set()
        self._spare = 0

    @property
    def asleep(self) -> bool:
        """Whether anything a request needs is away."""
        return bool(self._asleep)

    def release(self, tags: Sequence[str] | None) -> str:
        """Give memory up, on an idle engine whose prefix cache is empty.

        Args:
            tags: what goes; None or nothing for all.

        Returns:
            Why it could not be, with all as it was, or nothing.
        """
        new = set(tags or TAGS) - self._asleep
        if "weights" in new:
            failed = self._try_all(lambda: self._worker.sleep(1))
            if failed:
                self._worker.wake()
                return f"kvcached cannot sleep: {failed}"
            self._spare = self._rank.spare()
            self._rank.note_away(self._away())
            away = self._ranks.gather(self._away())
            if self._rank.scheduler is not None:
                assert self._rank.scheduler.sleep is not None
                self._rank.scheduler.sleep.note_away(away)
        if "kv_cache" in new:
            self._rank.give_all()
        self._asleep |= new
        return ""

    def resume(self, tags: Sequence[str] | None) -> str:
        """Have memory again, once the ledgers have room.

        Args:
            tags: what comes; None or nothing for all that is away.

        Returns:
            Why it could not be, with all asleep as before, or nothing.
        """
        old = set(tags or TAGS) & self._asleep
        if "weights" in old:
            coming = self._ranks.gather(self._away())
            failed = self._lead(coming) if self._rank.scheduler is not None else self._follow()
            if failed:
                return failed
            self._spare = 0
            self._rank.note_away(0)
        self._asleep -= old
        return ""

    def _away(self) -> int:
        return self._worker.away() + self._spare

    def _lead(self, coming: Sequence[int]) -> str:
        scheduler = self._rank.scheduler
        assert scheduler is not None and scheduler.sleep is not None
        try:
            with scheduler.sleep.waking(coming):
                self._ranks.broadcast("")
                if failed := self._wake_all():
                    raise _Failed(failed)
        except (WakeRefused, VmmError) as error:
            self._ranks.broadcast(str(error))
            return str(error)
        except _Failed as error:
            return str(error)
        return ""

    def _follow(self) -> str:
        refused = self._ranks.broadcast(None)
        return str(refused) if refused else self._wake_all()

    def _wake_all(self) -> str:
        def wake() -> None:
            self._worker.wake()
            self._worker.finish()

        failed = self._try_all(wake)
        if failed:
            self._worker.sleep_again()
            return f"the weights did not come back: {failed}"
        return ""

    def _try_all(self, act: Callable[[], None]) -> str:
        """Why it failed on any rank, or nothing."""
        try:
            act()
            error = ""
        except (OSError, MemoryError, VmmError) as caught:
            error = str(caught)
        return "; ".join(sorted({e for e in self._ranks.gather(error) if e}))

    @property
    def num_bytes(self) -> int:
        """Of this rank's weights."""
        return self._worker.num_bytes

    def close(self) -> None:
        self._worker.close()


def weights_of(
    server_args: Any, config: Config, kind: str, ordinal: int, model: Any, place: tuple[int, int]
) -> WorkerSleep:
    """Move a loaded model's weights to where they can sleep.

    Args:
        server_args: the engine's arguments.
        config: kvcached's settings.
        kind: of the device.
        ordinal: of the device.
        model: this rank's.
        place: this rank, and how many there are.
    """
    # Of its own: on the host a backend counts what the KV cache may have.
    backend = open_backend(kind, ordinal, config)
    a = server_args
    identity = fingerprint(
        (a.model_path, a.revision, a.dtype, a.quantization, place),
        [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()],
    )
    directory = config.weights_path(kind)
    sweep(directory)

    def group(tensors: Any, key: str | None) -> Group:
        copy = copy_of_engine(backend, directory, key, kind)
        return Group(backend, MovedMemory(backend, tensors), copy)

    return WorkerSleep(
        group(model.parameters(), identity), {"weights": group(model.buffers(), None)}
    )
