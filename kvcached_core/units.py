# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them: ``"512MiB"``, ``"1.5 GiB"``, ``"2M"``, ``4096``."""

from __future__ import annotations

import re

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
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
