# SPDX-License-Identifier: Apache-2.0
"""API keys: read from a file or the environment, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..config import ConfigError


class KeySource(BaseModel):
    """Where keys come from: exactly one of the three."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str | None = None
    """A variable of the environment that holds one key."""
    file: Path | None = None
    """A file with a key on each line; relative to the configuration."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """The hash of a key in hex, as ``printf %s KEY | sha256sum`` prints it."""

    @model_validator(mode="after")
    def _one(self) -> KeySource:
        if sum(value is not None for value in (self.env, self.file, self.sha256)) != 1:
            raise ValueError("write exactly one of 'env', 'file' and 'sha256'")
        return self

    def read(self, folder: Path) -> list[str]:
        """The keys themselves; at least one.

        Args:
            folder: what a relative ``file`` is relative to.

        Raises:
            ConfigError: there is none, or this is a hash.
        """
        if self.env is not None:
            key = os.environ.get(self.env, "").strip()
            if not key:
                raise ConfigError(f"the environment has no {self.env}: set it to the key")
            return [key]
        if self.file is None:
            raise ConfigError("a key cannot be read from its hash")
        path = folder / self.file.expanduser()
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}: name a file with a key a line") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{path} has no key in it: write one on each line")
        return keys


class Keys:
    """The keys that are accepted; with none of them, everything is."""

    def __init__(self, digests: frozenset[bytes] = frozenset()) -> None:
        self._digests = digests

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, presented: str | None) -> bool:
        """Whether this is one of the keys. Takes as long for every wrong one."""
        if presented is None:
            return False
        digest = _digest(presented)
        # Not any(): all are compared, whichever it is.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def collect(source: KeySource, folder: Path) -> frozenset[bytes]:
    """Hashes of the keys that a source names.

    Raises:
        ConfigError: there are none.
    """
    if source.sha256 is not None:
        return frozenset([bytes.fromhex(source.sha256)])
    return frozenset(_digest(key) for key in source.read(folder))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
