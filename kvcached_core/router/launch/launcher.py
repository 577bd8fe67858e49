# SPDX-License-Identifier: Apache-2.0
"""All engines that one router runs, and what they share: ports, turns to start, MPS."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from ..model import Model
from ..replica import Replica
from ..settings import GpuSettings, ModelSettings, ReplicaSettings, RouterSettings
from .command import Recipe, command, environment
from .mps_guard import MpsGuard
from .supervisor import Hooks, Place, Supervisor
from .turns import Turns


class Launcher:
    """Makes supervisors, and ends what they run."""

    def __init__(self, settings: Callable[[], RouterSettings], guard: MpsGuard) -> None:
        self.guard = guard
        self._settings = settings
        self._ports: dict[int, asyncio.Lock] = {}
        self._turns = Turns()
        self._replicas: list[Replica] = []

    def recipe(self, model: ModelSettings, replica: ReplicaSettings) -> Recipe | None:
        """What the settings say of an engine's process; None for one that is not launched."""
        if replica.launch is None:
            return None
        gpu = self._settings().gpus.get(replica.gpu or "")
        return command(model, replica), environment(model, replica, gpu, {})

    def equip(self, model: Model, replica: Replica) -> Supervisor:
        """Give a replica that is to be launched a supervisor, which starts nothing yet."""
        launch = replica.settings.launch
        assert launch is not None
        engine = replica.engine

        def make() -> Recipe:
            gpu = self._gpu(replica)
            secrets = _secrets(self._settings())
            env = environment(model.settings, replica.settings, gpu, os.environ, secrets)
            return command(model.settings, replica.settings), env

        async def probe(timeout: float) -> None:
            await engine.check(timeout, asleep=replica.asleep is not False)

        async def look(most_s: float) -> None:
            health = self._settings().health
            await replica.probe(health, min(health.timeout, most_s))

        async def pause(most_s: float) -> None:
            await replica.pause(min(self._settings().health.interval, most_s))

        def changed() -> None:
            replica.process_changed()
            if replica.available:
                # The time in which it started is none of idleness.
                model.traffic.touch()

        supervisor = Supervisor(
            f"{model.name} on port {launch.port}",
            launch,
            Place(
                self._ports.setdefault(launch.port, asyncio.Lock()),
                self._turns.of(lambda: (replica.settings.gpu or replica.name, self._gpu(replica))),
            ),
            Hooks(
                make,
                probe,
                look,
                pause,
                # A model that sleeps is started by the request that wakes it.
                restart=lambda: replica.asleep is not True,
                changed=changed,
            ),
        )
        replica.launch_with(supervisor, lambda: model.settings.sleep.kind)
        self.guard.join(supervisor, lambda: self._gpu(replica))
        self._replicas.append(replica)
        return supervisor

    def arrange(self, replicas: list[Replica]) -> None:
        """Take the order of the configuration, and how many may start at a time."""
        self._turns.configure(self._settings().gpus)
        self.guard.arrange([r.supervisor for r in replicas if r.supervisor is not None])

    def forget(self, replica: Replica) -> None:
        """Note that one was closed for good."""
        if replica.supervisor is not None:
            self._replicas.remove(replica)
            self.guard.leave(replica.supervisor)

    async def stop(self) -> None:
        """End all engines, and MPS if that was started for them."""
        supervisors = [r.supervisor for r in self._replicas if r.supervisor is not None]
        await asyncio.gather(*(supervisor.stop("the router ends") for supervisor in supervisors))
        await self.guard.stop()

    def _gpu(self, replica: Replica) -> GpuSettings:
        name = replica.settings.gpu
        found = self._settings().gpus.get(name) if name is not None else None
        return found if found is not None else GpuSettings()


def _secrets(settings: RouterSettings) -> set[str]:
    """Variables with keys of the router's clients."""
    return {key.env for key in (*settings.keys, *settings.admin_keys) if key.env is not None}
