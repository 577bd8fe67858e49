# SPDX-License-Identifier: Apache-2.0
"""What the commands that change something have in common: pick, ask, wait, say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import typer

from ..units import Amount, format_size
from . import as_json
from .acknowledge import require, wait
from .errors import CtlError
from .frames import Ledgers
from .options import read
from .policy import Change, Trim, change, trim
from .select import Target, pick

ValueOf = Callable[[int], int | None]
"""What to set where a ledger has that capacity; None is "none"."""


@dataclass(frozen=True, slots=True)
class How:
    """The options of a command that asks something of members."""

    ledgers: Ledgers
    json: bool
    wait: bool
    timeout_s: float


def set_policy(
    how: How,
    name: str,
    field: str,
    value: ValueOf,
    expected_version: int | None = None,
) -> None:
    """Set ``field`` of the member to ``value(capacity)`` in every ledger that has it.

    Raises:
        CtlError: refused, or not acknowledged in time.
    """
    targets = _targets(how, name)
    if expected_version is not None and len(targets) > 1:
        raise CtlError("--if-version means one ledger's version: name the ledger with --ledger")
    changes = change(
        how.ledgers, targets, field, lambda target: value(target.frame.capacity), expected_version
    )
    _finish(how, changes, "changes", f"{field.replace('_', ' ')} of {name}")


def give_back(how: How, name: str, wanted: int | None, cached: bool) -> None:
    """Have the member give back unused memory: ``wanted`` bytes in each ledger, or all.

    Raises:
        CtlError: refused, not done in time, or less than wanted was unused.
    """
    trims = trim(how.ledgers, _targets(how, name), wanted, cached)
    _finish(how, trims, "trims", f"trim of {name}")
    short = [entry for entry in trims if entry.short] if how.wait else []
    if short:
        lines = (
            f"{entry.request.target.label}: {format_size(entry.short)} less than asked"
            for entry in short
        )
        raise CtlError(
            "\n".join(lines) + "\nThe rest is in use by running requests; lower the limit to "
            "have those preempted"
        )


def bytes_or(unbounded: int | None) -> Callable[[Amount], ValueOf]:
    """Reads an amount, with ``unbounded`` for an operator's "none"."""

    def of(amount: Amount) -> ValueOf:
        def value(capacity: int) -> int | None:
            num_bytes = amount.resolve(capacity)
            return unbounded if num_bytes is None else num_bytes

        return value

    return of


def number(value: int) -> ValueOf:
    """The same number for every capacity."""
    return lambda _: value


def _targets(how: How, name: str) -> list[Target]:
    targets = pick(read(how.ledgers), name)
    if len(targets) > 1:
        keys = ", ".join(target.frame.key for target in targets)
        note = f"{name} is a member of {len(targets)} ledgers ({keys}); this applies to all of them"
        print(f"{note}. Name one with --ledger", file=sys.stderr)
    return targets


def _finish(how: How, asked: Sequence[Change] | Sequence[Trim], key: str, what: str) -> None:
    requests = [entry.request for entry in asked]
    if how.wait:
        wait(how.ledgers, requests, how.timeout_s)
    if how.json:
        acknowledged = all(request.acknowledged for request in requests)
        result = {
            "schema": as_json.SCHEMA,
            "acknowledged": acknowledged,
            key: [entry.as_json() for entry in asked],
        }
        typer.echo(as_json.dump(result))
    else:
        for entry in asked:
            typer.echo(entry.describe())
    if how.wait:
        require(requests, what, how.timeout_s)
