# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them: ``"512MiB"``, ``"1.5 GiB"``, ``"2M"``, ``4096``, ``"25%"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_UNBOUNDED = {"none", "unlimited"}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return the number of bytes in ``text``; all units are powers of 1024.

    Raises:
        ValueError: ``text`` is not a size; the message shows what one looks like.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = _SIZE.fullmatch(str(text))
        if match is None:
            raise ValueError(f"{text!r} is not a size: write bytes or e.g. '512MiB', '2GiB'")
        value = int(float(match[1]) * 1024 ** _POWERS[match[2].lower()])
    if value < 0:
        raise ValueError(f"a size cannot be negative: {text!r}")
    return value


def format_size(num_bytes: float) -> str:
    """Return ``num_bytes`` in the largest binary unit that keeps it at or above one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes, a share of a ledger's capacity, or (both None) no bound at all."""

    num_bytes: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str | int | Amount) -> Amount:
        """Read ``"8GiB"``, ``8589934592``, ``"25%"``, ``"none"`` or ``"unlimited"``.

        Raises:
            ValueError: it is none of these, or more than 100 %.
        """
        if isinstance(text, Amount):
            return text
        if isinstance(text, str):
            if text.strip().lower() in _UNBOUNDED:
                return cls()
            match = _PERCENT.fullmatch(text)
            if match is not None:
                if float(match[1]) > 100:
                    raise ValueError(f"{text!r} is more than the whole: give 0% to 100%")
                return cls(percent=float(match[1]))
        try:
            return cls(num_bytes=parse_size(text))
        except ValueError as error:
            raise ValueError(f"{error}; '25%' and 'unlimited' are understood too") from None

    def resolve(self, capacity: int) -> int | None:
        """The bytes of a ledger with ``capacity``; None for no bound."""
        if self.percent is not None:
            return int(capacity * self.percent / 100)
        return self.num_bytes
