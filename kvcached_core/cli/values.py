# SPDX-License-Identifier: Apache-2.0
"""What an operator types, beside the amounts of memory that :class:`Amount` reads."""

from __future__ import annotations

import re

from ..units import Amount, format_size

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|)\s*")
_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def parse_percent(text: str) -> Amount:
    """``"25"`` or ``"25%"``.

    Raises:
        ValueError: not a number from 0 to 100.
    """
    amount = Amount.parse(f"{text.strip().removesuffix('%')}%")
    if amount.percent is None:
        raise ValueError(f"{text!r} is not a percentage from 0 to 100")
    return amount


def parse_duration(text: str) -> float:
    """Seconds in ``"10s"``, ``"500ms"``, ``"2m"`` or ``"10"``.

    Raises:
        ValueError: not a duration.
    """
    match = _DURATION.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write e.g. '10s', '500ms' or '2m'")
    return float(match[1]) * _SECONDS[match[2]]


def parse_address(text: str) -> tuple[str, int]:
    """Address and port of ``"127.0.0.1:9400"``, ``"[::1]:9400"`` or ``"9400"`` (this host only).

    Raises:
        ValueError: no port in it, or an impossible one.
    """
    address, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDRESS:PORT, e.g. '127.0.0.1:9400'")
    return address.strip("[]") or "127.0.0.1", int(port)


def show_bytes(num_bytes: int | None) -> str:
    return "none" if num_bytes is None else format_size(num_bytes)


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: names come from other processes."""
    return "".join(char if char.isprintable() else "?" for char in text)
