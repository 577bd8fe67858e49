# SPDX-License-Identifier: Apache-2.0
"""An engine joins the ledgers of the devices its ranks are on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ._core import Ledger, LedgerRefused, Member
from .accounts import Account
from .config import Config, ConfigError
from .devices import defaults, open_usage, prepare_ledger_dir
from .holding import Holding
from .plan import ArenaShape, RankDevice, WorkerBinding
from .scheduler import ElasticScheduler
from .sleep.engine_sleep import EngineSleep
from .units import format_size
from .usage import DeviceUsage


@dataclass(frozen=True, slots=True)
class Joined:
    """An engine in its ledgers."""

    scheduler: ElasticScheduler
    bindings: list[WorkerBinding | None]
    """What every rank opens its first pool's arena with; None for a rank without a KV cache."""
    config: Config
    devices: Sequence[RankDevice]
    memberships: dict[str, tuple[Ledger, Member]]
    """Of every device."""

    def add_pool(
        self,
        shapes: Sequence[ArenaShape],
        *,
        holding: Holding,
        logger: logging.Logger,
    ) -> list[WorkerBinding]:
        """Have a further pool, as :meth:`ElasticScheduler.add_pool`.

        Args:
            shapes: the arenas of every rank, one rank after the other, as many of each.

        Returns:
            What they are opened with.

        Raises:
            ConfigError: the memory is not there.
        """
        distinct = _distinct(shapes)
        devices = [d for d in self.devices for _ in range(len(shapes) // len(self.devices))]
        accounts = _priced(self.memberships, shapes, devices)
        _log_shapes(logger, self.config, distinct)
        try:
            self.scheduler.add_pool(
                shapes[0].num_blocks,
                distinct,
                list(accounts.values()),
                holding,
            )
        except MemoryError as error:
            raise ConfigError(_explain(error, accounts)) from None
        return [
            _bind(accounts[d.key], s, retry_ms=self.config.retry_ms, zero_recycled=False)
            for s, d in zip(shapes, devices, strict=True)
        ]


def join(
    config: Config,
    shapes: Sequence[ArenaShape | None],
    devices: Sequence[RankDevice],
    *,
    holding: Holding,
    zero_recycled: Sequence[bool],
    logger: logging.Logger,
) -> Joined:
    """Join the ledgers of all ranks as one member of each.

    Args:
        config: the engine's settings.
        shapes: the arena of every rank; one of them at least is there. Several arenas of a rank
            that share their block ids follow each other.
        devices: where every rank is.
        holding: blocks a request holds.
        zero_recycled: for every rank, whether its pages are zeroed when they change hands.
        logger: the engine's.

    Raises:
        ConfigError: the memory is not there, or the policy refuses.
    """
    used = [shape for shape in shapes if shape is not None]
    distinct = _distinct(used)
    arenas = len(shapes) // len(devices)
    where = [device for device in devices for _ in range(arenas)]
    directory = prepare_ledger_dir(config)
    memberships: dict[str, tuple[Ledger, Member]] = {}
    usages: dict[str, DeviceUsage | None] = {}
    for device in devices:
        if device.key in memberships:
            continue
        headroom = config.headroom
        if headroom is None:
            headroom = defaults(device.kind).headroom
        ledger = Ledger(str(directory / f"{device.key}.ledger"), device.total_bytes, headroom)
        usage = usages[device.key] = open_usage(device)
        if usage is not None:
            usage.publish(ledger)
        static = sum(d.static_bytes for d in devices if d.key == device.key)
        memberships[device.key] = ledger, _become_member(ledger, config, static)
    accounts = _priced(memberships, shapes, where)
    bindings = [
        None
        if shape is None
        else _bind(accounts[device.key], shape, retry_ms=config.retry_ms, zero_recycled=zeroed)
        for shape, device, zeroed in zip(shapes, where, zero_recycled, strict=True)
    ]
    _log(logger, config, list(accounts.values()), distinct)
    ahead = config.commit_ahead
    if ahead is None:
        ahead = defaults(devices[0].kind).commit_ahead
    try:
        scheduler = ElasticScheduler(
            used[0].num_blocks,
            distinct,
            list(accounts.values()),
            parked_bytes=ahead * 3 // 4 if config.parked is None else config.parked,
            ahead_bytes=ahead,
            decay_s=config.parked_decay_ms / 1000,
            usages=list(usages.values()),
            holding=holding,
            start_wait_s=config.start_wait_ms / 1000,
        )
    except MemoryError as error:
        raise ConfigError(_explain(error, accounts)) from None
    keys = [device.key for device in devices]
    scheduler.sleep = EngineSleep(scheduler, memberships, keys, config.wake_wait_ms / 1000)
    return Joined(scheduler, bindings, config, devices, memberships)


def _distinct(shapes: Sequence[ArenaShape]) -> list[ArenaShape]:
    return sorted(set(shapes), key=lambda s: s.block_bytes * s.segments, reverse=True)


def _priced(
    memberships: dict[str, tuple[Ledger, Member]],
    shapes: Sequence[ArenaShape | None],
    devices: Sequence[RankDevice],
) -> dict[str, Account]:
    """The memberships, with what a page and a block of these shapes cost all ranks there."""
    distinct = _distinct([shape for shape in shapes if shape is not None])
    accounts = {}
    for key, (ledger, member) in memberships.items():
        ranks = [
            shape
            for shape, device in zip(shapes, devices, strict=True)
            if device.key == key and shape is not None
        ]
        accounts[key] = Account(
            ledger=ledger,
            member=member,
            page_cost=tuple(ranks.count(s) * s.page_bytes * s.segments for s in distinct),
            block_cost=sum(s.block_bytes * s.segments for s in ranks),
        )
    return accounts


def _explain(error: MemoryError, accounts: dict[str, Account]) -> str:
    state = "; ".join(
        f"{account.ledger.path}: {format_size(account.ledger.available())} free, held by "
        + (", ".join(f"{m.name} {format_size(m.leased)}" for m in account.ledger.members()))
        for account in accounts.values()
    )
    return (
        f"kvcached cannot start: {error} ({state}). Free memory on the device, or lower "
        "KVCACHED_HEADROOM"
    )


def _become_member(ledger: Ledger, config: Config, static_bytes: int) -> Member:
    try:
        return ledger.join(
            config.name,
            static_bytes,
            guarantee=config.guarantee.resolve(ledger.capacity) or 0,
            limit=config.limit.resolve(ledger.capacity),
            weight=config.weight,
            priority=config.priority,
            cache_limit=config.prefix_cache.resolve(ledger.capacity),
        )
    except (LedgerRefused, ValueError) as error:
        raise ConfigError(f"kvcached cannot start: {error}") from None


def _bind(
    account: Account, shape: ArenaShape, *, retry_ms: int, zero_recycled: bool
) -> WorkerBinding:
    return WorkerBinding(
        shape=shape,
        ledger_path=account.ledger.path,
        capacity_bytes=account.ledger.capacity,
        headroom_bytes=account.ledger.headroom,
        slot=account.member.slot,
        generation=account.member.generation,
        retry_ms=retry_ms,
        zero_recycled=zero_recycled,
    )


def _log(
    logger: logging.Logger,
    config: Config,
    accounts: Sequence[Account],
    shapes: Sequence[ArenaShape],
) -> None:
    for account in accounts:
        logger.info(
            "Elastic KV cache: member %r of %s, %s free of %s",
            config.name,
            account.ledger.path,
            format_size(account.ledger.available()),
            format_size(account.ledger.capacity),
        )
    _log_shapes(logger, config, shapes)


def _log_shapes(logger: logging.Logger, config: Config, shapes: Sequence[ArenaShape]) -> None:
    for shape in shapes:
        logger.info(
            "Elastic KV cache: %d virtual blocks of %s in pages of %s (%s-major)",
            shape.num_blocks,
            format_size(shape.block_bytes * shape.segments),
            format_size(shape.page_bytes),
            config.layout,
        )
