# SPDX-License-Identifier: Apache-2.0
"""Room for a model that wakes: others that are idle go to sleep sooner than they would."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from ..cli.frames import Ledgers
from ..sleep.wake_lease import is_waking
from .model import Model
from .states import Busy, State

log = logging.getLogger(__name__)
_LOOK_S = 0.1


class Room:
    """Looks after models that wake.

    A waking engine asks its ledger for room, and other engines give what their requests do not
    need. An idle engine's weights nobody but the router can have: as long as the ledger says that
    a waking engine waits, the model that has been idle for longest is put to sleep.

    Args:
        models: of the router, now.
        directory: where their engines' ledgers are, now.
    """

    def __init__(
        self, models: Callable[[], Collection[Model]], directory: Callable[[], Path]
    ) -> None:
        self._models = models
        self._directory = directory
        self._ledgers: Ledgers | None = None

    async def watch(self) -> None:
        """Make room whenever it is wanted, for ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
            except Exception:
                log.exception("making room for a model failed")

    async def _look(self) -> None:
        waking = [model for model in self._models() if model.state is State.WAKING]
        if not any(map(self._idlest, waking)):
            return
        if not await asyncio.to_thread(self._is_wanted, self._directory()):
            return
        for model in waking:
            # Meanwhile it may have woken, and who was idle may have requests.
            idle = self._idlest(model) if model.state is State.WAKING else None
            if idle is not None:
                log.info("%s sleeps sooner: %s waits for room", idle.name, model.name)
                with contextlib.suppress(Busy):
                    await idle.sleep(by_hand=False)
                return

    def _is_wanted(self, directory: Path) -> bool:
        """Whether an engine waits for room to wake; runs in a thread, once at a time."""
        if self._ledgers is None or self._ledgers.directory != directory:
            self._ledgers = Ledgers(directory)
        return any(
            member.alive and member.demand and is_waking(member.name)
            for frame in self._ledgers.frames()
            for member in frame.members
        )

    def _idlest(self, waking: Model) -> Model | None:
        """The model on the same GPU that could best do without its memory."""
        yielding = [
            model for model in self._models() if model.yields and _share_a_gpu(model, waking)
        ]
        return max(yielding, key=lambda model: model.traffic.idle_s, default=None)


def _share_a_gpu(one: Model, other: Model) -> bool:
    """As far as the configuration says: a replica without a GPU may be on any."""
    ours, theirs = ({replica.settings.gpu for replica in m.replicas} for m in (one, other))
    return None in ours | theirs or bool(ours & theirs)
