# SPDX-License-Identifier: Apache-2.0
"""Memory beside the engines' KV caches, out of the same ledger: a training loop, say.

    with Reservation("trainer", key="gpu-GPU-…") as memory:
        with memory.hold(10 << 30, timeout_s=600):
            train()  # allocates up to 10 GiB, and frees them again

Allocate only after a lease was granted, and free before it is given back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import pynvml

from ._core import Ledger, LedgerRefused
from .accounts import Bell
from .config import Config, ConfigError
from .devices import defaults, prepare_ledger_dir
from .units import format_size
from .usage import DeviceUsage
from .watcher import Watcher

_LOOK_MS = 50
"""How often to look without a bell: foreign memory that is freed rings none."""
_ATTEND_MS = 200
"""How often to see to policies and the driver's totals while nothing rings."""


class Reservation:
    """Bytes that the engines on a device leave alone, as one more member of its ledger.

    What is held is in use and says so in the ledger: others are not promised any of it, and it
    is never asked for. Safe to use from several threads.

    Args:
        name: how it appears in the ledger.
        key: which ledger, ``gpu-<uuid as NVML prints it>`` or ``host-<name>``.
        config: where the ledger is, and this member's guarantee, limit, weight and priority.
        capacity: the device's bytes, as the engines count them, to make a ledger with. By
            default the config's on the host; on a GPU an existing ledger's or else NVML's.

    Raises:
        ConfigError: the ledger cannot be made, or its policy refuses the guarantee.
        VmmError: the ledger is corrupt, or in use with another capacity.
    """

    def __init__(
        self,
        name: str,
        key: str = "host-0",
        config: Config | None = None,
        *,
        capacity: int | None = None,
    ) -> None:
        config = Config.load() if config is None else config
        path = prepare_ledger_dir(config) / f"{key}.ledger"
        host = key.startswith("host-")
        self.name = name
        self._usage = None if host else _open_usage(key)
        headroom = config.headroom
        if capacity is None and host:
            capacity = config.capacity
        elif capacity is None and self._usage is not None and not path.exists():
            capacity = self._usage.total_bytes()
        if headroom is None and capacity is not None:
            headroom = defaults("host" if host else "cuda").headroom
        self.ledger = Ledger(path, capacity, headroom)
        self._publish_usage()
        try:
            self._member = self.ledger.join(
                name,
                guarantee=config.guarantee.resolve(self.ledger.capacity) or 0,
                limit=config.limit.resolve(self.ledger.capacity),
                weight=config.weight,
                priority=config.priority,
                cache_limit=config.prefix_cache.resolve(self.ledger.capacity),
            )
        except (LedgerRefused, ValueError) as error:
            raise ConfigError(f"{name} cannot reserve memory: {error}") from None
        self._watcher = Watcher(self._attend, lambda: None, Bell(self._member).wait, _ATTEND_MS)

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._member.info().leased

    def resize(self, num_bytes: int, timeout_s: float = 0.0) -> bool:
        """Hold ``num_bytes``, waiting for them if need be; False leaves it as it was.

        Raises:
            ValueError: negative, or more than the ledger ever has.
        """
        if num_bytes < 0:
            raise ValueError(f"cannot hold {num_bytes} bytes")
        more = num_bytes - self.bytes
        if more > 0:
            return self._grow(more, timeout_s)
        self._shrink(-more)
        return True

    @contextmanager
    def hold(self, num_bytes: int, timeout_s: float = 60.0) -> Iterator[None]:
        """Hold that many bytes more inside the block.

        Raises:
            TimeoutError: they did not come in time; the message names who holds what.
            ValueError: negative, or more than the ledger ever has.
        """
        if num_bytes < 0:
            raise ValueError(f"cannot hold {num_bytes} bytes")
        if not self._grow(num_bytes, timeout_s):
            raise TimeoutError(self._explain(num_bytes, timeout_s))
        try:
            yield
        finally:
            self._shrink(num_bytes)

    def close(self) -> None:
        """Give everything back and leave; again is fine."""
        self._watcher.stop()
        self._member.leave()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _grow(self, more: int, timeout_s: float) -> bool:
        most = self.ledger.capacity - self.ledger.headroom
        if self.bytes + more > most:
            raise ValueError(
                f"{self.name} would hold {format_size(self.bytes + more)}, and {self.ledger.path} "
                f"has {format_size(most)} for all: ask for less"
            )
        begin = time.monotonic()
        heard = self._member.bell
        granted = self._lease(more)
        try:
            while not granted:
                left_ms = math.ceil((begin + timeout_s - time.monotonic()) * 1000)
                if left_ms <= 0:
                    return False
                # What a limit forbids is not asked of others, but the limit may be raised.
                limit = self._member.policy().limit
                self._member.set_demand(more if limit is None or self.bytes + more <= limit else 0)
                # Plans anew: an engine that does not answer is passed over, and others are asked.
                self._member.ask()
                heard = self._member.wait_bell(heard, min(left_ms, _LOOK_MS))
                granted = self._lease(more)
        finally:
            self._member.set_demand(0)
            self._comply()
        self._member.time("wait", time.monotonic() - begin)
        return True

    def _lease(self, more: int) -> bool:
        self._publish_usage()
        if not self._member.lease(more):
            return False
        # As an engine's pages: or the driver's totals would count them a second time.
        self._member.add_committed(more)
        self._member.set_pinned(self.bytes)
        return True

    def _shrink(self, less: int) -> None:
        self._member.add_committed(-less)
        self._member.release(less)
        self._member.set_pinned(self.bytes)
        self._member.touch()
        self._comply()

    def _attend(self) -> bool:
        """Between calls, from the watcher's thread."""
        self._publish_usage()
        self._comply()
        return False

    def _comply(self) -> None:
        """Acknowledge what is already so; nothing held is parked or cached."""
        policy = self._member.policy()
        if policy.version != policy.observed and (
            policy.limit is None or self.bytes <= policy.limit
        ):
            self._member.observe(policy.version)
        if policy.trim is not None:
            self._member.trim_done(policy.trim[0])

    def _publish_usage(self) -> None:
        if self._usage is not None:
            self._usage.publish(self.ledger)

    def _explain(self, num_bytes: int, timeout_s: float) -> str:
        held = ", ".join(
            f"{member.name} {format_size(member.leased)}"
            for member in self.ledger.members()
            if member.alive and member.leased
        )
        return (
            f"{self.name} did not get {format_size(num_bytes)} within {timeout_s:g} s: "
            f"{format_size(self._member.claimable())} of {self.ledger.path} are free for it; "
            f"held by {held or 'no member'}. Give it a guarantee or a higher priority, or others "
            "a limit (kvctl)"
        )


def _open_usage(key: str) -> DeviceUsage:
    try:
        return DeviceUsage(key)
    except pynvml.NVMLError as error:
        raise ConfigError(
            f"NVML does not know {key} ({error}): give gpu-<uuid> as `nvidia-smi -L` prints it"
        ) from None
