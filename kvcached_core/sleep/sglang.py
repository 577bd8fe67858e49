# SPDX-License-Identifier: Apache-2.0
"""SGLang's memory saver under the ledger: its tags and endpoints, and memory of ours."""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)
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
        reload: loads them again.
    """

    def __init__(self, rank: SglangRank, ranks: Ranks, worker: WorkerSleep, reload: Reload) -> None:
        self._rank = rank
        self._ranks = ranks
        self._worker = worker
        self._reload = reload
        self._asleep: set[str] = set()
        self._spare = 0

    @property
    def asleep(self) -> bool:
        """Whether anything a request needs is away."""
        return bool(self._asleep)

    def release(self, tags: Sequence[str] | None, level: int = 1) -> str:
        """Give memory up, on an idle engine whose prefix cache is empty.

        Args:
            tags: what goes; None or nothing for all.
            level: 1 keeps the weights on the host. 2 drops them: to resume all loads them again,
                to resume tags leaves that to whoever does it.

        Returns:
            Why it could not be, with all as it was, or nothing.
        """
        if level not in (1, 2):
            return f"kvcached cannot sleep: there is no level {level}, only 1 and 2"
        if level == 2 and not tags and self._reload.obstacle:
            return f"kvcached cannot sleep: {self._reload.obstacle}"
        new = set(tags or TAGS) - self._asleep
        if "weights" in new:
            failed = self._try_all(lambda: self._worker.sleep(level))
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
            load = self._worker.level == 2 and not tags
            leads = self._rank.scheduler is not None
            failed = self._lead(coming, load) if leads else self._follow(load)
            if failed:
                return failed
            self._spare = 0
            self._rank.note_away(0)
        self._asleep -= old
        return ""

    def _away(self) -> int:
        return self._worker.away() + self._spare

    def _lead(self, coming: Sequence[int], load: bool) -> str:
        scheduler = self._rank.scheduler
        assert scheduler is not None and scheduler.sleep is not None
        try:
            with scheduler.sleep.waking(coming):
                self._ranks.broadcast("")
                if failed := self._wake_all(load):
                    raise _Failed(failed)
        except (WakeRefused, VmmError) as error:
            self._ranks.broadcast(str(error))
            return str(error)
        except _Failed as error:
            return str(error)
        return ""

    def _follow(self, load: bool) -> str:
        refused = self._ranks.broadcast(None)
        return str(refused) if refused else self._wake_all(load)

    def _wake_all(self, load: bool) -> str:
        def wake() -> None:
            self._worker.wake()
            if load:
                self._reload()
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


class Reload:
    """Loads a rank's weights again, into the memory in which they were.

    Args:
        runner: the engine's, which has the model.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @property
    def obstacle(self) -> str:
        """Why that cannot be, or nothing."""
        args, config = self._runner.server_args, self._runner.model_config
        if args.load_format == "dummy":
            reason = "weights that --load-format=dummy made up"
        elif config.quantization is not None:
            reason = "quantized weights, which are no longer what was loaded,"
        else:
            return ""
        return (
            f"{reason} cannot be loaded again. Use level 1, or name the tags, and update the "
            "weights yourself after they are resumed"
        )

    def __call__(self) -> None:
        """Load them.

        Raises:
            OSError: it cannot be; what the weights are now is undefined.
        """
        if self.obstacle:
            raise OSError(self.obstacle)
        args = self._runner.server_args
        before = {name: tensor.data for name, tensor in self._runner.model.named_parameters()}
        try:
            done, said = self._runner.update_weights_from_disk(args.model_path, args.load_format)
        except Exception as error:  # whatever loaders raise
            log.exception("loading %s again", args.model_path)
            done, said = False, str(error) or type(error).__name__
        if not done:
            raise OSError(f"{args.model_path} cannot be loaded again: {said}")
        # What is done to weights after they are loaded may put them elsewhere.
        for name, tensor in self._runner.model.named_parameters():
            place = before.get(name)
            if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                raise OSError(f"{name} is another tensor once it is loaded again: use level 1")
            if place.data_ptr() != tensor.data_ptr():
                place.copy_(tensor.data)
                tensor.data = place


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
