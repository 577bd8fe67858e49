# SPDX-License-Identifier: Apache-2.0
"""What an operator can set, from the environment and from engine flags.

``ENABLE_KVCACHED=true`` switches the feature on; every field of
:class:`Config` can be given as ``KVCACHED_<FIELD>`` in the environment or in
the engine's ``--kvcached-config`` JSON, which wins.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .units import Amount, parse_size

SWITCH = "ENABLE_KVCACHED"
PREFIX = "KVCACHED_"
WEIGHTS = "weights"
"""Folder beside the ledgers for the weights of engines that sleep."""

Bytes = Annotated[int, BeforeValidator(parse_size)]
AmountOf = Annotated[Amount, BeforeValidator(Amount.parse)]

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


class ConfigError(ValueError):
    """A setting is wrong; the message names it and the remedy."""


def is_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``ENABLE_KVCACHED`` asks for the feature.

    Raises:
        ConfigError: the value is neither true nor false.
    """
    value = (os.environ if environ is None else environ).get(SWITCH, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"{SWITCH}={value!r} is neither true nor false; set it to 'true' or unset it")


def default_ledger_dir() -> Path:
    """A directory on memory-backed storage that belongs to this user alone."""
    shm = Path("/dev/shm")
    root = shm if shm.is_dir() else Path(tempfile.gettempdir())
    return root / f"kvcached-{os.getuid()}"


def default_disk_dir() -> Path:
    """A directory of this user's where temporary files go."""
    return Path(tempfile.gettempdir()) / f"kvcached-{os.getuid()}"


def default_host_capacity() -> int:
    """Half of this machine's memory: an engine's weights and buffers need the rest."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Config(BaseModel):
    """Validated settings of one engine; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default_factory=lambda: f"engine-{os.getpid()}", min_length=1, max_length=63)
    """How the engine appears in the ledger."""
    ledger_dir: Path = Field(default_factory=default_ledger_dir)
    """Directory of the ledgers: engines that share memory share this directory."""
    page_size: Bytes | None = Field(default=None, gt=0)
    """Bytes of one page; ``None`` takes the device's measured default."""
    layout: Literal["block", "layer"] = "block"
    """``block``: one block of all layers is contiguous. ``layer``: one range a layer."""
    headroom: Bytes | None = None
    """Bytes of a GPU never leased; ``None`` takes 512 MiB on a GPU, 0 on the host."""
    parked: Bytes | None = None
    """Freed bytes an idle engine keeps mapped; ``None``: three quarters of ``commit_ahead``."""
    parked_decay_ms: int = Field(default=2000, ge=0)
    """How long freed pages beyond ``parked`` stay unused before they are given back."""
    commit_ahead: Bytes | None = None
    """Bytes kept committed ahead of a growing engine; ``None`` takes the device's default."""
    max_kv: Bytes | None = Field(default=None, gt=0)
    """Upper bound of this engine's KV cache per rank; ``None`` leaves it to the ledger."""
    guarantee: AmountOf = Amount(0)
    """Bytes (or percent) of each ledger that others never hold against this engine."""
    limit: AmountOf = Amount()
    """Bytes (or percent) of each ledger this engine never exceeds; ``unlimited`` for none."""
    weight: int = Field(default=100, ge=1, le=10_000)
    """Share of contended memory relative to the other engines' weights."""
    priority: int = Field(default=0, ge=0, le=100)
    """Engines of higher priority are served first, at the cost of lower ones' requests."""
    prefix_cache: AmountOf = Amount()
    """Bound of unreferenced prefix-cache blocks; ``unlimited`` holds them until others ask."""
    sm_share: int | None = Field(default=None, ge=1, le=100)
    """Percent of a GPU's SMs under MPS; ``None`` for all. Acts through ``kvctl mps env``."""
    mps_memory: Bytes | None = Field(default=None, ge=1 << 30)
    """Ceiling that MPS puts on a process's whole memory of each GPU; ``None`` for none."""
    start_wait_ms: int = Field(default=30_000, ge=0)
    """How long a starting engine waits for its first page while others give memory back."""
    wake_wait_ms: int = Field(default=30_000, ge=0)
    """How long an engine that is to wake waits for room while others give memory back."""
    weights_dir: Path | None = None
    """Where weights lie while an engine sleeps; ``None`` takes ``weights`` beside the ledgers on a
    GPU, and a folder on disk on the host."""
    retry_ms: int = Field(default=60_000, ge=0)
    """How long a worker waits for a foreign process that holds leased memory."""
    capacity: Bytes = Field(default_factory=default_host_capacity, gt=0)
    """Host backend only: bytes all engines share."""
    host_name: str = Field(default="0", pattern=r"^[A-Za-z0-9_.-]{1,32}$")
    """Host backend only: which host ledger (``host-<name>.ledger``)."""

    def weights_path(self, kind: str) -> Path:
        """Where the weights of a device of this kind lie while an engine sleeps."""
        if self.weights_dir is not None:
            return self.weights_dir
        # In memory, from which a device reads at the bus's speed; but the host's own weights would
        # not have left it there.
        root = self.ledger_dir if kind != "host" else default_disk_dir()
        return root / WEIGHTS

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Merge the environment and ``overrides`` (which win) and validate them.

        Raises:
            ConfigError: an unknown or impossible setting, each on a line of its own.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {
            field: environ[PREFIX + field.upper()]
            for field in cls.model_fields
            if environ.get(PREFIX + field.upper(), "") != ""
        }
        values.update(overrides or {})
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else "?"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(Config.model_fields))
            lines.append(f"kvcached has no setting {field!r}; it knows {known}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"kvcached setting {field} (or {PREFIX}{field.upper()}): {message}")
    return "\n".join(lines)
