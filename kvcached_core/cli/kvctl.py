# SPDX-License-Identifier: Apache-2.0
"""``kvctl``: show and change what engines may hold of a device's memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..units import format_size, parse_size
from . import as_json, kvtop, mps, options, serve, tables
from .apply import How, ValueOf, bytes_or, give_back, number, set_policy
from .cleanup import delete_member, delete_unused
from .entry import run
from .follow import EventReader
from .frames import Ledgers
from .options import Expect, Json, Key, LedgerDir, Name, Names, Timeout, Value, Wait
from .select import Target, matching, only, pick

app = typer.Typer(
    help="Show and change what engines may hold of a device's memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_TIMEOUT_S = 10.0
_FOLLOW_S = 0.2


def _ledgers(directory: LedgerDir, key: Key) -> Ledgers:
    return Ledgers(options.directory_or_default(directory), key)


def _print_json(value: object) -> None:
    typer.echo(as_json.dump(value))


@app.command("list")
def list_(
    members: Names = None, json: Json = False, ledger_dir: LedgerDir = None, ledger: Key = None
) -> None:
    """All ledgers and their members."""
    ledgers = _ledgers(ledger_dir, ledger)
    frames = ledgers.frames()
    if members or ledger is not None:
        frames = options.read(ledgers)
    for name in members or []:
        if not matching(frames, name):
            pick(frames, name)  # says what there is
    frames = only(frames, members or [])
    if json:
        _print_json(as_json.ledgers(ledgers.directory, frames))
    elif frames:
        tables.console().print(tables.listing(frames))
    else:
        print(f"no ledger in {ledgers.directory}", file=sys.stderr)


@app.command()
def show(
    member: Name, json: Json = False, ledger_dir: LedgerDir = None, ledger: Key = None
) -> None:
    """Everything the ledger knows of a member."""
    frames = options.read(_ledgers(ledger_dir, ledger))
    found = matching(frames, member) or pick(frames, member)  # the dead are shown, too
    if json:
        members = [as_json.member(target.frame.key, target.member) for target in found]
        _print_json({"schema": as_json.SCHEMA, "members": members})
        return
    for target in found:
        tables.console().print(tables.detail(target.frame, target.member))


def _policy_command(
    name: str, field: str, argument: Any, value_of: Callable[[Any], ValueOf], text: str
) -> None:
    """Add the command that sets one field of a member's policy."""

    def command(
        member: Name,
        value: Any,
        json: Json = False,
        wait: Wait = True,
        timeout: Timeout = _TIMEOUT_S,
        if_version: Expect = None,
        ledger_dir: LedgerDir = None,
        ledger: Key = None,
    ) -> None:
        how = How(_ledgers(ledger_dir, ledger), json, wait, timeout)
        set_policy(how, member, field, value_of(value), if_version)

    # Typer makes the argument from its annotation.
    command.__annotations__["value"] = argument
    app.command(name, help=text)(command)


_policy_command(
    *("limit", "limit", Value, bytes_or(None)),
    "Set the most a member may hold; what it holds beyond is taken back.",
)
_policy_command(
    *("limit-percent", "limit", options.Percent, bytes_or(None)),
    "As limit, in percent of the ledger's capacity.",
)
_policy_command(
    *("guarantee", "guarantee", Value, bytes_or(0)),
    "Set what a member can always have; refused if all guarantees no longer fit.",
)
_policy_command(
    *("weight", "weight", options.Weight, number),
    "Set a member's share of contended memory, relative to the others' weights.",
)
_policy_command(
    *("priority", "priority", options.Priority, number),
    "Set who is served first; a higher one may preempt running requests of lower ones.",
)
_policy_command(
    *("cache", "cache_limit", Value, bytes_or(None)),
    "Set the bound of a member's unreferenced prefix cache.",
)


@app.command()
def trim(
    member: Name,
    cached: Annotated[
        bool, typer.Option("--cached", help="The unreferenced prefix cache as well.")
    ] = False,
    json: Json = False,
    wait: Wait = True,
    timeout: Timeout = _TIMEOUT_S,
    ledger_dir: LedgerDir = None,
    ledger: Key = None,
) -> None:
    """Have a member give back all that is unused."""
    give_back(How(_ledgers(ledger_dir, ledger), json, wait, timeout), member, None, cached)


@app.command()
def reclaim(
    member: Name,
    num_bytes: Annotated[
        int,
        typer.Argument(metavar="BYTES", help="E.g. '2GiB'.", parser=options.reader(parse_size)),
    ],
    json: Json = False,
    wait: Wait = True,
    timeout: Timeout = _TIMEOUT_S,
    ledger_dir: LedgerDir = None,
    ledger: Key = None,
) -> None:
    """Have a member give back at least so much: parked pages first, then prefix cache."""
    give_back(How(_ledgers(ledger_dir, ledger), json, wait, timeout), member, num_bytes, True)


@app.command()
def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as events happen; ends with Ctrl-C.")
    ] = False,
    since: Annotated[int, typer.Option(help="Only events with a higher sequence number.")] = 0,
    json: Json = False,
    ledger_dir: LedgerDir = None,
    ledger: Key = None,
) -> None:
    """What happened of late: members that came, left or died, asks, refusals, preemptions."""
    ledgers = _ledgers(ledger_dir, ledger)
    if not follow:
        options.read(ledgers)  # no ledger is an error, unless one may still come
    reader = EventReader(ledgers, since)
    console = tables.console()
    found = reader.read()
    if json and not follow:
        entries = [as_json.event(key, entry) for key, entry in found]
        _print_json({"schema": as_json.SCHEMA, "events": entries})
        return
    while True:
        for key, entry in found:
            if json:
                print(as_json.dump(as_json.event(key, entry), indent=None))
            else:
                console.print(tables.event_line(key, entry), soft_wrap=True)
        if not follow:
            return
        sys.stdout.flush()
        time.sleep(_FOLLOW_S)
        found = reader.read()


@app.command()
def delete(
    member: Annotated[
        str | None,
        typer.Argument(metavar="[MEMBER]", help="A dead member.", show_default=False),
    ] = None,
    json: Json = False,
    ledger_dir: LedgerDir = None,
    ledger: Key = None,
) -> None:
    """Remove a dead member, or all of them and the ledgers nobody uses; never a living one."""
    ledgers = _ledgers(ledger_dir, ledger)
    deleted = delete_unused(ledgers) if member is None else delete_member(ledgers, member)
    if json:
        _print_json(
            {
                "schema": as_json.SCHEMA,
                "members": [as_json.member(t.frame.key, t.member) for t in deleted.members],
                "ledgers": deleted.ledgers,
                "kept": [frame.key for frame in deleted.kept],
            }
        )
        return
    for target in deleted.members:
        typer.echo(f"{target.label}: was dead, its {_held(target)} are free again")
    for key in deleted.ledgers:
        typer.echo(f"{key}: deleted")
    for frame in deleted.kept:
        typer.echo(f"{frame.key}: kept, {len(frame.living)} living members")
    if not (deleted.members or deleted.ledgers or deleted.kept):
        typer.echo("nothing to delete")


def _held(target: Target) -> str:
    return format_size(target.member.leased)


app.command()(serve.export)
app.add_typer(mps.app, name="mps")
app.command("watch", help="The same as kvtop.")(kvtop.top)
app.command("kvtop", help="Watch ledgers and members live.")(kvtop.top)


def main(args: Sequence[str] | None = None) -> int:
    return run(app, "kvctl", args)


if __name__ == "__main__":
    sys.exit(main())
