# SPDX-License-Identifier: Apache-2.0
"""Runs a typer application so that a failure is one message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from .._core import VmmError
from .errors import FAILED, CtlError

_INTERRUPTED = 130


def run(app: typer.Typer, program: str, args: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 failed, 2 wrong usage, 3 not acknowledged in time."""
    try:
        app(args=None if args is None else list(args), prog_name=program)
    except SystemExit as exit_:  # how click ends, well or not
        return exit_.code if isinstance(exit_.code, int) else FAILED
    except CtlError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except (VmmError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0
