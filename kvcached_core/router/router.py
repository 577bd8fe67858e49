# SPDX-License-Identifier: Apache-2.0
"""All models of one router, what watches them, and taking other settings while they serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from ..config import ConfigError
from .body import Bodies
from .engines import EngineError
from .errors import ApiError
from .gate import Gate
from .keys import Keys
from .launch.launcher import Launcher
from .launch.mps_guard import MpsGuard
from .loading import Loaded, load
from .metrics import Metrics
from .model import Model
from .replica import Replica
from .room import Room
from .settings import GpuSettings, ModelSettings, RouterSettings
from .states import Busy

log = logging.getLogger(__name__)
_IDLE_LOOK_S = 1.0
_DRAIN_LOOK_S = 0.05
_START_LOOK_S = 0.2


class Router:
    """What the endpoints work on. Made, started and stopped in one event loop."""

    def __init__(self, loaded: Loaded, guard: MpsGuard | None = None) -> None:
        self.started_at = time.time()
        self.models: dict[str, Model] = {}
        self.reloads = 0
        self._loaded = loaded
        guard = guard or MpsGuard()
        self.metrics = Metrics(lambda: self.models.values(), lambda: guard.faults)
        self._launcher = Launcher(lambda: self.settings, guard)
        self._room = Room(lambda: self.models.values(), lambda: self.settings.ledger_dir)
        self.bodies = Bodies(lambda: self.settings.limits)
        self._gates: dict[str, Gate] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: dict[Replica, asyncio.Task[None]] = {}
        self._leaving: dict[Replica, Model] = {}
        """Those that were taken out and have requests."""

    @property
    def settings(self) -> RouterSettings:
        return self._loaded.settings

    @property
    def keys(self) -> Keys:
        return self._loaded.keys

    @property
    def admin_keys(self) -> Keys:
        return self._loaded.admin_keys

    @property
    def gates(self) -> list[Gate]:
        """The queues that are in use."""
        # One that a reload did away with may come back with the next: who runs must count then.
        present = [replica for model in self.models.values() for replica in model.replicas]
        used = {replica.gate for replica in (*present, *self._leaving)}
        return [gate for gate in self._gates.values() if gate in used or gate.busy]

    def model(self, name: str) -> Model:
        """The model of that name.

        Raises:
            ApiError: there is none (status 404).
        """
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r}: GET /v1/models has them",
                code="model_not_found",
                param="model",
            )
        return found

    async def start(self) -> None:
        """Connect to the engines and begin to watch them."""
        self._apply(self._loaded)
        self._spawn(self._watch_idle(), "idle")
        self._spawn(self._room.watch(), "room")
        await asyncio.gather(*(model.settled() for model in self.models.values()))

    async def stop(self) -> None:
        """Stop watching, end the engines that were launched here, and close all connections.

        Requests in flight have ended.
        """
        tasks = [*self._tasks, *self._watchers.values()]
        # What is being woken would start an engine that nobody ends.
        for model in {*self.models.values(), *self._leaving.values()}:
            tasks += model.abandon()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._launcher.stop()
        present = [replica for model in self.models.values() for replica in model.replicas]
        for replica in (*present, *self._leaving):
            await replica.close()

    def reload(self) -> None:
        """Read the file again and serve by it; requests in flight go on as they are.

        Raises:
            ConfigError: it is wrong, or changes what needs a restart. All stays as it was.
        """
        loaded = load(self._loaded.path)
        if loaded.settings.listen != self.settings.listen:
            raise ConfigError(
                f"{loaded.path}: 'listen' has changed, which needs a restart: restart the router "
                "or change it back"
            )
        self._apply(loaded)
        self.reloads += 1
        log.info("%s was read again", loaded.path)

    # -- settings ---------------------------------------------------------------------------------

    def _apply(self, loaded: Loaded) -> None:
        # Nothing is awaited here: requests see the old settings or the new ones.
        self._loaded = loaded
        before = self.models
        self.models = {}
        for settings in loaded.settings.models:
            known = before.pop(settings.name, None)
            self.models[settings.name] = self._update(known, settings)
        for model in before.values():
            for replica in model.replicas:
                self._retire(model, replica)
        self._launcher.arrange([r for model in self.models.values() for r in model.replicas])
        self._gates = {gate.name: gate for gate in self.gates}

    def _update(self, model: Model | None, settings: ModelSettings) -> Model:
        known = {replica.name: replica for replica in model.replicas} if model else {}
        replicas = []
        fresh = []
        for each in settings.replicas:
            key = self._loaded.engine_keys.get(each.url)
            gate = self._gate(each.gpu, each.url)
            recipe = self._launcher.recipe(settings, each)
            replica = known.get(each.url)
            if replica is not None and replica.same_as(each, key, recipe):
                del known[each.url]
                replica.settings = each
                replica.gate = gate
            else:
                connect_s = self.settings.limits.connect_time
                replica = Replica(each, gate, connect_s, key, recipe)
                fresh.append(replica)
            replicas.append(replica)
        if model is None:
            model = Model(settings, replicas)
            sleep = settings.sleep
            self._launch(model, fresh, asleep=sleep.at_start and sleep.kind == "cold")
            model.learn(self.settings.health.timeout)
            if sleep.at_start and sleep.kind == "engine":
                self._spawn(self._sleep_at_start(model), f"sleep {model.name}")
        else:
            for replica in known.values():
                self._retire(model, replica)
            model.settings = settings
            model.replicas = replicas
            self._launch(model, fresh, asleep=model.rests)
            model.joined(fresh)
        for replica in fresh:
            replica.on_change = model.note_change
            watch = self._watch(model, replica)
            self._watchers[replica] = asyncio.create_task(watch, name=f"health {replica.name}")
        return model

    def _launch(self, model: Model, replicas: list[Replica], *, asleep: bool) -> None:
        for replica in replicas:
            if replica.settings.launch is not None:
                supervisor = self._launcher.equip(model, replica)
                if not asleep:
                    supervisor.start()

    def _gate(self, gpu: str | None, url: str) -> Gate:
        name, settings = (
            (f"replica {url}", GpuSettings())
            if gpu is None
            else (f"gpu {gpu}", self.settings.gpus[gpu])
        )
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = Gate(name, settings)
        else:
            gate.configure(settings)
        return gate

    def _retire(self, model: Model, replica: Replica) -> None:
        self._watchers.pop(replica).cancel()
        self._leaving[replica] = model

        async def drain() -> None:
            # Also requests that wait for the model to wake may still choose it.
            removed = model.name not in self.models or self.models[model.name] is not model
            while replica.load or (removed and model.pending):
                await asyncio.sleep(_DRAIN_LOOK_S)
            await replica.close()
            self._launcher.forget(replica)
            del self._leaving[replica]

        self._spawn(drain(), f"drain {replica.name}")

    # -- watching ---------------------------------------------------------------------------------

    async def _watch(self, model: Model, replica: Replica) -> None:
        while True:
            try:
                await replica.look(self.settings.health)
                await model.mend(replica)
            except EngineError as error:
                log.warning("%s: a replica stays asleep: %s", model.name, error)
            except Exception:
                # One that nobody looks at any more would never come back.
                log.exception("%s: a look at %s failed", model.name, replica.name)
            await replica.pause(self.settings.health.interval)

    async def _sleep_at_start(self, model: Model) -> None:
        while not any(replica.available for replica in model.replicas):
            await asyncio.sleep(_START_LOOK_S)
            if self.models.get(model.name) is not model:
                return
        # Busy: somebody asks for it already.
        with contextlib.suppress(Busy):
            await model.sleep(by_hand=False)

    async def _watch_idle(self) -> None:
        while True:
            afters = [
                model.settings.sleep.after
                for model in self.models.values()
                if model.settings.sleep.after is not None
            ]
            await asyncio.sleep(min([_IDLE_LOOK_S, *(after / 4 for after in afters)]))
            for model in list(self.models.values()):
                if model.sleeps_when_idle:
                    self._spawn(_put_to_sleep(model), f"sleep {model.name}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed in an unforeseen way", task.get_name(), exc_info=error)


async def _put_to_sleep(model: Model) -> None:
    # Busy: a request came first, or its engines refused, which is logged there.
    with contextlib.suppress(Busy):
        if model.sleeps_when_idle:
            await model.sleep(by_hand=False)
