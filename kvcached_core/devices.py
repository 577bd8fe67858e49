# SPDX-License-Identifier: Apache-2.0
"""From a device to its backend, its ledger and its measured defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pynvml

from ._core import Backend, CudaBackend, HipBackend, HostBackend
from .config import Config, ConfigError
from .plan import RankDevice
from .units import format_size
from .usage import DeviceUsage

logger = logging.getLogger(__name__)

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a device gets when the operator says nothing; figures in docs/decisions.md."""

    page_size: int
    headroom: int
    commit_ahead: int


_DEFAULTS = {
    "cuda": Defaults(page_size=16 * _MIB, headroom=512 * _MIB, commit_ahead=64 * _MIB),
    "hip": Defaults(page_size=16 * _MIB, headroom=512 * _MIB, commit_ahead=64 * _MIB),
    "host": Defaults(page_size=2 * _MIB, headroom=0, commit_ahead=8 * _MIB),
}


def defaults(kind: str) -> Defaults:
    return _DEFAULTS[kind]


def open_backend(kind: str, ordinal: int, config: Config) -> Backend:
    """Open the memory of device ``ordinal``.

    Raises:
        VmmError: the driver library is missing or refuses; the message says which.
    """
    if kind == "cuda":
        return CudaBackend(ordinal)
    if kind == "hip":
        return HipBackend(ordinal)
    return HostBackend(config.host_name, config.capacity)


def describe(backend: Backend, kind: str, config: Config, static_bytes: int = 0) -> RankDevice:
    """What the scheduler half needs to know of a worker's device."""
    total = config.capacity if kind == "host" else backend.memory_info()[1]
    return RankDevice(
        kind="cuda" if kind == "cuda" else "hip" if kind == "hip" else "host",
        key=backend.device_key,
        total_bytes=total,
        granularity=backend.granularity,
        static_bytes=static_bytes,
    )


def page_size(device: RankDevice, config: Config, *, least: bool = False) -> int:
    """The page size on ``device``.

    Args:
        least: the smallest there can be, if none is configured: for what has many pages a block.

    Raises:
        ConfigError: the configured size is not a multiple of the granularity.
    """
    usual = device.granularity if least else defaults(device.kind).page_size
    size = config.page_size or max(usual, device.granularity)
    if size % device.granularity:
        raise ConfigError(
            f"kvcached page_size {format_size(size)} is not a multiple of the "
            f"{format_size(device.granularity)} granularity of {device.key}: "
            f"set KVCACHED_PAGE_SIZE to a multiple of it"
        )
    return size


def prepare_ledger_dir(config: Config) -> Path:
    """Make the ledger directory, for this user alone.

    Raises:
        ConfigError: it cannot be made or written.
    """
    path = config.ledger_dir
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"kvcached ledger directory {path} cannot be made ({error.strerror}): "
            "set KVCACHED_LEDGER_DIR to a directory this user can write"
        ) from None
    return path


def open_usage(device: RankDevice) -> DeviceUsage | None:
    """The driver's totals for a GPU; None on the host, where nothing else is counted."""
    if device.kind != "cuda":
        return None
    try:
        return DeviceUsage(device.key)
    except pynvml.NVMLError as error:
        logger.warning(
            "NVML does not answer for %s (%s): memory of processes outside the ledger is not "
            "counted on this GPU; raise KVCACHED_HEADROOM if there are any",
            device.key,
            error,
        )
        return None
