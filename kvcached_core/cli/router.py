# SPDX-License-Identifier: Apache-2.0
"""``kvcached-router``: serves the models of a configuration, or checks it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import ConfigError
from .entry import run
from .errors import CtlError

if TYPE_CHECKING:
    from ..router.loading import Loaded

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)
]


@app.command()
def serve(config: Config) -> None:
    """Serve the models in CONFIG until SIGTERM or Ctrl-C; SIGHUP reads it again."""
    loaded = _load(config)
    from ..router.serve import serve as run_server

    try:
        run_server(loaded)
    except ConfigError as error:
        raise CtlError(str(error)) from None


@app.command()
def check(config: Config) -> None:
    """Say whether CONFIG is right, and where it is not."""
    settings = _load(config).settings
    replicas = sum(len(model.replicas) for model in settings.models)
    typer.echo(f"{config}: {len(settings.models)} models with {replicas} replicas, nothing wrong")


def _load(config: Path) -> Loaded:
    # Here and not above: engines that share the environment need none of it.
    try:
        from ..router.loading import load
    except ModuleNotFoundError as error:
        raise CtlError(
            f"{error.name} is not installed: pip install 'kvcached-core[router]'"
        ) from None
    try:
        return load(config)
    except ConfigError as error:
        raise CtlError(str(error)) from None


def main(args: Sequence[str] | None = None) -> int:
    return run(app, "kvcached-router", args)


if __name__ == "__main__":
    sys.exit(main())
