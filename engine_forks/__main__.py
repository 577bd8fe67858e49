# SPDX-License-Identifier: Apache-2.0
"""Command line: python -m engine_forks VERB PIN [options]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine_forks import build as build_verb
from engine_forks import check as check_verb
from engine_forks import rebase as rebase_verb
from engine_forks.apply import apply
from engine_forks.errors import ForkError
from engine_forks.export import export
from engine_forks.fetch import default_cache, fetch
from engine_forks.pin import REPO, Artifact, Pin, load_pin, pin_names
from engine_forks.requirements import requirements
from engine_forks.wheel import wheel_identity


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    run: Callable[[Pin, argparse.Namespace], int] = args.run
    try:
        return run(load_pin(args.pin, args.root), args)
    except ForkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _fetch(pin: Pin, args: argparse.Namespace) -> int:
    wanted = [pin.source] if "source" in args.what else []
    wanted += [_wheel(pin, name, args) for name in args.what if name != "source"]
    for artifact in wanted:
        print(fetch(artifact, args.cache))
    return 0


def _apply(pin: Pin, args: argparse.Namespace) -> int:
    tree = _tree(pin, args)
    commits = apply(pin, fetch(pin.source, args.cache), tree, force=args.force)
    print(f"{tree}: {len(commits) - 1} patches on {pin.name}, HEAD is {commits[-1]}")
    return 0


def _export(pin: Pin, args: argparse.Namespace) -> int:
    for name in export(pin, _tree(pin, args)):
        print(pin.patches / name)
    return 0


def _check(pin: Pin, args: argparse.Namespace) -> int:
    wheels = {name: fetch(_wheel(pin, name, args), args.cache) for name in args.variant}
    report = check_verb.check(pin, fetch(pin.source, args.cache), wheels, args.root)
    print(f"{'existing':>8} {'new':>6}  lines changed by")
    for size in report.sizes:
        print(f"{size.existing:8} {size.new:6}  {size.name}")
    print(f"{report.total:8} of {check_verb.BUDGET} lines in existing files of {pin.name}")
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def _rebase(pin: Pin, args: argparse.Namespace) -> int:
    onto = args.archive or fetch(load_pin(args.onto, args.root).source, args.cache)
    tree = args.tree or _default_tree(args.onto or _release(onto))
    outcomes = rebase_verb.rebase(pin, fetch(pin.source, args.cache), onto, tree)
    for outcome in outcomes:
        print(f"{outcome.how:8}  {outcome.name}  {' '.join(outcome.files)}".rstrip())
    failed = sum(outcome.how == "conflict" for outcome in outcomes)
    if failed:
        print(
            f"{failed} of {len(outcomes)} patches need a person. {tree} stands at the first one:\n"
            "mend the files, `git add` them, `git am --continue`; then `export` under the new pin."
        )
    else:
        print(f"all {len(outcomes)} patches apply; the result is in {tree}")
    return 1 if failed else 0


def _build(pin: Pin, args: argparse.Namespace) -> int:
    if args.from_source and (args.variant != "cuda" or args.relax_torch):
        raise ForkError(
            "--from-source is for the cuda variant as it is: the engine's own build takes compiled"
            " files only from that wheel. Leave --from-source out for another variant."
        )
    released = fetch(_wheel(pin, args.variant, args), args.cache)
    if args.from_source:
        archive = fetch(pin.source, args.cache)
        isolated = not args.no_build_isolation
        path = build_verb.build_from_source(pin, archive, released, args.out, isolated=isolated)
    else:
        path = build_verb.build(pin, args.variant, released, args.out, relax_torch=args.relax_torch)
    print(path)
    return 0


def _requirements(pin: Pin, args: argparse.Namespace) -> int:
    released = fetch(_wheel(pin, args.variant, args), args.cache)
    wanted = requirements(pin, args.variant, released) + (
        list(pin.test_requires) if args.tests else []
    )
    print("\n".join(wanted))
    return 0


def _wheel(pin: Pin, variant: str, args: argparse.Namespace) -> Artifact:
    return pin.wheel(variant, args.machine, args.python)


def _release(archive: Path) -> str:
    if archive.suffix == ".whl":
        return "-".join(wheel_identity(archive)[:2])
    return archive.name.removesuffix(".tar.gz")


def _tree(pin: Pin, args: argparse.Namespace) -> Path:
    tree: Path | None = args.tree
    return tree or _default_tree(pin.name)


def _default_tree(name: str) -> Path:
    return Path("build") / "forks" / name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine_forks", description=__doc__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(
        name: str, run: Callable[[Pin, argparse.Namespace], int], help_text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(run=run)
        sub.add_argument("pin", metavar="PIN", help=f"one of: {', '.join(pin_names())}")
        sub.add_argument("--cache", type=Path, default=default_cache(), help="download folder")
        sub.add_argument("--root", type=Path, default=REPO, help="repository with pins and patches")
        return sub

    def machine(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--machine", help="x86_64 or aarch64 (default: this machine)")
        sub.add_argument("--python", help="a wheel's tag, e.g. cp312 (default: this Python)")

    def tree(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--tree", type=Path, help="work tree (default: build/forks/<pin>)")

    sub = verb("fetch", _fetch, "download released files and verify them against the pin")
    sub.add_argument("what", nargs="*", default=["source", "cpu"], help="source, cuda, cpu")
    machine(sub)

    sub = verb("apply", _apply, "make a git work tree of the release with one commit per patch")
    sub.add_argument("--force", action="store_true", help="replace an existing work tree")
    tree(sub)

    sub = verb("export", _export, "write the work tree's commits back as the patch series")
    tree(sub)

    sub = verb("check", _check, "verify the series: exact, reproducible, explained, within budget")
    sub.add_argument(
        "--variant", action="append", default=[], help="also try this released wheel (repeatable)"
    )
    machine(sub)

    sub = verb("rebase", _rebase, "try the series on another release")
    target = sub.add_mutually_exclusive_group(required=True)
    target.add_argument("--onto", metavar="PIN", help="another pinned release")
    target.add_argument("--archive", type=Path, help="a release's source, not pinned yet")
    tree(sub)

    sub = verb("build", _build, "make the patched wheel")
    sub.add_argument("--variant", default="cuda", help="cuda (default) or cpu")
    sub.add_argument("--out", type=Path, default=Path("dist"), help="folder for the wheel")
    sub.add_argument(
        "--relax-torch", action="store_true", help="drop the local label of the torch requirement"
    )
    sub.add_argument(
        "--from-source",
        action="store_true",
        help="run the engine's own build of the patched source",
    )
    sub.add_argument(
        "--no-build-isolation", action="store_true", help="with --from-source: use this environment"
    )
    machine(sub)

    sub = verb("requirements", _requirements, "list what the engine needs, torch included")
    sub.add_argument("--variant", default="cuda", help="cuda (default) or cpu")
    sub.add_argument("--tests", action="store_true", help="add what the engine's own tests need")
    machine(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
