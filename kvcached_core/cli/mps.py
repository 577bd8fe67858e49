# SPDX-License-Identifier: Apache-2.0
"""``kvctl mps``: engines that compute at the same time instead of in turns."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..config import Config, ConfigError
from ..mps import Mps, MpsError, client_environment
from . import as_json
from .errors import CtlError
from .options import Json
from .values import printable

app = typer.Typer(
    help="NVIDIA MPS for this user's engines: they compute at the same time, not in turns.",
    no_args_is_help=True,
)
Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        envvar="KVCACHED_MPS_DIR",
        help="Of pipes and logs; else $XDG_RUNTIME_DIR/kvcached/mps or /tmp/kvcached-<uid>/mps.",
        show_default=False,
    ),
]


@contextmanager
def _as_failure() -> Iterator[None]:
    try:
        yield
    except (MpsError, ConfigError) as error:
        raise CtlError(str(error)) from None


@app.command()
def start(json: Json = False, directory: Directory = None) -> None:
    """Start the daemon; nothing happens if it runs. Engines started before do not use it."""
    with _as_failure():
        mps = Mps(directory)
        ran = mps.pid() is not None
        pid = mps.start()
    if json:
        where = str(mps.directory)
        value = {"schema": as_json.SCHEMA, "pid": pid, "started": not ran, "directory": where}
        typer.echo(as_json.dump(value))
        return
    typer.echo(f"MPS daemon {pid} {'was running' if ran else 'runs'} in {mps.directory}")
    typer.echo('start engines after: eval "$(kvctl mps env)"')


@app.command()
def status(json: Json = False, directory: Directory = None) -> None:
    """The daemon, its servers and their clients. Ends with 1 if it does not run."""
    with _as_failure():
        found = Mps(directory).status()
    if json:
        servers = [asdict(server) for server in found.servers]
        where = str(found.directory)
        value = {"schema": as_json.SCHEMA, "pid": found.pid, "directory": where, "servers": servers}
        typer.echo(as_json.dump(value))
    if found.pid is None:
        raise CtlError(f"no MPS daemon in {found.directory}: `kvctl mps start` starts one")
    if json:
        return
    typer.echo(f"daemon {found.pid} in {found.directory}")
    for server in found.servers:
        typer.echo(f"server {server.pid}: {printable(server.state)}")
        for pid, name in server.clients.items():
            typer.echo(f"  client {pid}  {printable(name)}")
    if not found.servers:
        typer.echo("no server: the first client starts it")


@app.command()
def env(json: Json = False, directory: Directory = None) -> None:
    """Print exports for a shell that starts an engine, from the same settings as memory."""
    with _as_failure():
        mps = Mps(directory)
        if mps.pid() is None:
            # A client that finds no daemon runs without MPS and says nothing.
            raise MpsError(f"no MPS daemon in {mps.directory}: `kvctl mps start` first")
        variables = client_environment(Config.load(), mps.directory)
    if json:
        typer.echo(as_json.dump({"schema": as_json.SCHEMA, "environment": variables}))
        return
    for name, value in variables.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def stop(
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also with clients, which lose the GPU.")
    ] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """End the daemon, once nobody uses it."""
    with _as_failure():
        mps = Mps(directory)
        stopped = mps.stop(force)
    if json:
        typer.echo(as_json.dump({"schema": as_json.SCHEMA, "stopped": stopped}))
    else:
        typer.echo("stopped" if stopped else f"no MPS daemon in {mps.directory}")
