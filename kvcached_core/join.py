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
from .plan import ArenaShape, RankDevice, WorkerBinding
from .scheduler import ElasticScheduler
from .units import format_size
from .usage import DeviceUsage


@dataclass(frozen=True, slots=True)
class Joined:
    """An engine in its ledgers."""

    scheduler: ElasticScheduler
    bindings: list[WorkerBinding | None]
    """What every rank opens its arena with; None for a rank without a KV cache."""


def join(
    config: Config,
    shapes: Sequence[ArenaShape | None],
    devices: Sequence[RankDevice],
    *,
    block_tokens: float,
    zero_recycled: Sequence[bool],
    logger: logging.Logger,
) -> Joined:
    """Join the ledgers of all ranks as one member of each.

    Args:
        config: the engine's settings.
        shapes: the arena of every rank; one of them at least is there.
        devices: where every rank is.
        block_tokens: tokens one block holds for every KV group.
        zero_recycled: for every rank, whether its pages are zeroed when they change hands.
        logger: the engine's.

    Raises:
        ConfigError: the memory is not there, or the policy refuses.
    """
    used = [shape for shape in shapes if shape is not None]
    distinct = sorted(set(used), key=lambda s: s.block_bytes * s.segments, reverse=True)
    directory = prepare_ledger_dir(config)
    accounts: dict[str, Account] = {}
    usages: dict[str, DeviceUsage | None] = {}
    for device in devices:
        if device.key in accounts:
            continue
        ranks = [
            shape
            for shape, other in zip(shapes, devices, strict=True)
            if other.key == device.key and shape is not None
        ]
        headroom = config.headroom
        if headroom is None:
            headroom = defaults(device.kind).headroom
        ledger = Ledger(str(directory / f"{device.key}.ledger"), device.total_bytes, headroom)
        usage = usages[device.key] = open_usage(device)
        if usage is not None:
            ledger.set_device_used(usage.used_bytes())
        static = sum(d.static_bytes for d in devices if d.key == device.key)
        accounts[device.key] = Account(
            ledger=ledger,
            member=_become_member(ledger, config, static),
            page_cost=tuple(ranks.count(s) * s.page_bytes * s.segments for s in distinct),
            block_cost=sum(s.block_bytes * s.segments for s in ranks),
        )
    bindings = [
        None
        if shape is None
        else _bind(accounts[device.key], shape, retry_ms=config.retry_ms, zero_recycled=zeroed)
        for shape, device, zeroed in zip(shapes, devices, zero_recycled, strict=True)
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
            parked_bytes=ahead if config.parked is None else config.parked,
            ahead_bytes=ahead,
            decay_s=config.parked_decay_ms / 1000,
            usages=list(usages.values()),
            block_tokens=block_tokens,
            start_wait_s=config.start_wait_ms / 1000,
        )
    except MemoryError as error:
        state = "; ".join(
            f"{account.ledger.path}: {format_size(account.ledger.available())} free, held by "
            + (", ".join(f"{m.name} {format_size(m.leased)}" for m in account.ledger.members()))
            for account in accounts.values()
        )
        raise ConfigError(
            f"kvcached cannot start: {error} ({state}). Free memory on the device, or lower "
            "KVCACHED_HEADROOM"
        ) from None
    return Joined(scheduler, bindings)


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
    for shape in shapes:
        logger.info(
            "Elastic KV cache: %d virtual blocks of %s in pages of %s (%s-major)",
            shape.num_blocks,
            format_size(shape.block_bytes * shape.segments),
            format_size(shape.page_bytes),
            config.layout,
        )
