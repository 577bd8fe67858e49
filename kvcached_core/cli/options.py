# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that commands share, and what completes them in a shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..config import default_ledger_dir
from ..units import Amount
from .errors import CtlError
from .frames import SUFFIX, LedgerFrame, Ledgers
from .select import no_ledgers
from .values import parse_duration, parse_percent

_T = TypeVar("_T")


def reader(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    # Typer keeps the message of its own exception only.
    def read(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return read


def _seconds(value: str | float) -> float:
    return reader(parse_duration)(str(value))


def directory_or_default(directory: Path | None) -> Path:
    return default_ledger_dir() if directory is None else directory


def _complete_member(ctx: typer.Context, incomplete: str) -> list[str]:
    ledgers = Ledgers(directory_or_default(ctx.params.get("ledger_dir")), ctx.params.get("ledger"))
    names = {member.name for frame in ledgers.frames() for member in frame.members}
    return sorted(name for name in names if name.startswith(incomplete))


def _complete_ledger(ctx: typer.Context, incomplete: str) -> list[str]:
    paths = Ledgers(directory_or_default(ctx.params.get("ledger_dir"))).paths()
    keys = (path.name.removesuffix(SUFFIX) for path in paths)
    return [key for key in keys if key.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(
        metavar="MEMBER",
        help="Its name, or its slot as '#3'.",
        autocompletion=_complete_member,
        show_default=False,
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MEMBER]...",
        help="Only these; names, or slots as '#3'.",
        autocompletion=_complete_member,
        show_default=False,
    ),
]
Value = Annotated[
    Amount,
    typer.Argument(
        metavar="VALUE",
        help="Bytes ('8GiB'), a share of the ledger's capacity ('25%'), or 'none'.",
        parser=reader(Amount.parse),
        show_default=False,
    ),
]
Percent = Annotated[
    Amount,
    typer.Argument(
        metavar="PERCENT",
        help="Of the ledger's capacity, 0 to 100.",
        parser=reader(parse_percent),
        show_default=False,
    ),
]
Weight = Annotated[int, typer.Argument(metavar="WEIGHT", min=1, max=10_000, show_default=False)]
Priority = Annotated[int, typer.Argument(metavar="PRIORITY", min=0, max=100, show_default=False)]
LedgerDir = Annotated[
    Path | None,
    typer.Option(
        "--ledger-dir",
        envvar="KVCACHED_LEDGER_DIR",
        help="Directory of the ledgers; else /dev/shm/kvcached-<uid>.",
        show_default=False,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="KEY",
        help="Only this ledger, e.g. gpu-<uuid> or host-0.",
        autocompletion=_complete_ledger,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the member complied.")]
Timeout = Annotated[
    float,
    typer.Option(metavar="DURATION", help="How long to wait, e.g. 10s or 500ms.", parser=_seconds),
]
Expect = Annotated[
    int | None,
    typer.Option(
        "--if-version",
        help="Refuse if the policy has another version by now.",
        show_default=False,
    ),
]
Interval = Annotated[
    float,
    typer.Option(
        *("--interval", "-n", "--refresh", "-r"),
        metavar="DURATION",
        help="Time between two frames.",
        parser=_seconds,
    ),
]


def read(ledgers: Ledgers) -> list[LedgerFrame]:
    """All ledgers that were asked for.

    Raises:
        CtlError: there is none.
    """
    frames = ledgers.frames()
    if not frames:
        raise CtlError(no_ledgers(ledgers.directory, ledgers.key))
    return frames
