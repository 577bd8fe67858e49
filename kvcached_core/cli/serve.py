# SPDX-License-Identifier: Apache-2.0
"""``kvctl export``: the series of all ledgers for Prometheus."""

from __future__ import annotations

import sys
import threading
from typing import Annotated

import typer

from .. import export as series
from . import as_json, options
from .errors import CtlError
from .frames import LedgerFrame, Ledgers
from .options import Json, Key, LedgerDir
from .values import parse_address


def export(
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS:PORT",
            help="Serve the text there until Ctrl-C; a port alone is on this host only.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    ledger_dir: LedgerDir = None,
    ledger: Key = None,
) -> None:
    """Print the series of all ledgers as Prometheus reads them, or serve them."""
    ledgers = Ledgers(options.directory_or_default(ledger_dir), ledger)
    if listen is None:
        frames = options.read(ledgers)
        if json:
            samples = series.samples(lambda: frames)
            typer.echo(as_json.dump({"schema": as_json.SCHEMA, "samples": samples}))
        else:
            typer.echo(series.text(lambda: frames), nl=False)
        return
    address, port = options.reader(parse_address)(listen)
    # One reader for all requests, and they come in threads of their own.
    lock = threading.Lock()

    def read() -> list[LedgerFrame]:
        with lock:
            return ledgers.frames()

    try:
        with series.serve(read, address, port) as bound:
            host = f"[{address}]" if ":" in address else address
            print(f"serving http://{host}:{bound}/metrics", file=sys.stderr, flush=True)
            threading.Event().wait()
    except OSError as error:
        raise CtlError(f"cannot listen on {listen}: {error.strerror}; name another one") from None
