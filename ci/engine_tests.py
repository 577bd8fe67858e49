# SPDX-License-Identifier: Apache-2.0
"""The engine's own tests on the released and the patched engine: all must end alike.

    python -m ci.engine_tests --source vllm-0.24.0.tar.gz \\
        --variant stock=<dir>,off=<dir>,on=<dir> --tier ci --jobs 2 --out <dir>

Without `stock`, the patched engine that is `off` is what `on` is compared with, and the manifest's
numbers, which were taken from the released engine, are what says that `off` is whole.

A <dir> holds an installed engine (`pip install --no-deps --target <dir> <wheel>`); `-` is the
engine of this environment.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ci import compare, model_cache
from ci.manifest import Manifest, ManifestError, TestFile, load
from ci.runner import Outcomes, RunError, Settings, copy_tests, run_variant

HERE = Path(__file__).resolve().parent
SHOWN = 50  # problems
DETAILS = 5  # of a variant's, with what pytest said


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        manifest = load(
            args.manifest or HERE / f"{args.pin.replace('-', '_').replace('.', '_')}.toml"
        )
        engines = _engines(args.variant, manifest)
        files = _files(manifest, args.tier, args.files)
        ran = _run(args, manifest, engines, files)
    except (ManifestError, RunError) as error:
        print(f"engine tests: {error}", file=sys.stderr)
        return 2
    tables = {variant: outcomes.table for variant, outcomes in ran.items()}
    found = compare.problems(manifest, files, tables)
    _write_report(args.out / "report.json", args.tier, ran, found)
    _print_summary(ran, found)
    return 1 if found else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ci.engine_tests", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pin", default="vllm-0.24.0", help="names the manifest beside this file")
    parser.add_argument("--manifest", type=Path, help="another manifest")
    parser.add_argument("--source", type=Path, required=True, help="source tree or .tar.gz")
    parser.add_argument("--variant", required=True, metavar="NAME=DIR,...")
    parser.add_argument("--tier", default="ci")
    parser.add_argument("--files", default="*", help="only files matching this pattern")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="report, logs and the model cache")
    parser.add_argument("--model-cache", type=Path, help="where to keep it instead")
    return parser.parse_args(argv)


def _engines(text: str, manifest: Manifest) -> dict[str, Path | None]:
    """Where each variant's engine is; the first is what the others are compared with."""
    given: dict[str, Path | None] = {}
    for part in text.split(","):
        name, equals, place = part.partition("=")
        if name not in manifest.variants or not equals or not place:
            raise RunError(f"--variant {part}: give {', '.join(manifest.variants)} a folder or -")
        if place != "-" and not Path(place).is_dir():
            raise RunError(f"--variant {part}: no such folder")
        given[name] = None if place == "-" else Path(place).resolve()
    if not any(name in given for name in manifest.baselines):
        wanted = " or ".join(manifest.baselines)
        raise RunError(f"--variant: give {wanted}, what the others are compared with")
    ordered = sorted(manifest.variants, key=lambda name: name not in manifest.baselines)
    return {name: given[name] for name in ordered if name in given}


def _files(manifest: Manifest, tier: str, pattern: str) -> list[TestFile]:
    if tier not in manifest.tiers:
        raise RunError(f"--tier {tier}: not one of {', '.join(manifest.tiers)}")
    files = [f for f in manifest.tiers[tier] if fnmatch.fnmatchcase(f.path, pattern)]
    if not files:
        raise RunError(f"--files {pattern}: none in tier {tier}")
    return files


def _run(
    args: argparse.Namespace,
    manifest: Manifest,
    engines: dict[str, Path | None],
    files: list[TestFile],
) -> dict[str, Outcomes]:
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    cache = model_cache.build((args.model_cache or out / "model_cache").resolve())
    print(f"model cache: {time.monotonic() - began:.0f} s", flush=True)
    ran: dict[str, Outcomes] = {}
    # Not in nox's folder: the engine makes sockets below, whose paths have 107 characters at most.
    with tempfile.TemporaryDirectory(
        prefix="engine-tests-", dir="/tmp", ignore_cleanup_errors=True
    ) as work:
        tree = Path(work) / "tree"
        tree.mkdir()
        copy_tests(args.source, tree)
        absent = [file.path for file in files if not (tree / "tests" / file.path).is_file()]
        if absent:
            raise RunError(f"not in {args.source}: {', '.join(absent)}")
        env = {**manifest.env, "HF_HOME": str(cache)}
        settings = Settings(tree, Path(work), out, env, args.jobs)
        for name, engine in engines.items():
            print(f"{name}: {len(files)} files in {args.jobs} processes", flush=True)
            ran[name] = run_variant(manifest.variants[name], engine, files, settings)
            print(_line(name, ran[name]), flush=True)
    return ran


def _line(name: str, outcomes: Outcomes) -> str:
    counted = ", ".join(f"{n} {what}" for what, n in compare.counts(outcomes.table).items())
    return f"{name} ({outcomes.version}): {counted} in {outcomes.seconds:.0f} s"


def _write_report(path: Path, tier: str, ran: dict[str, Outcomes], found: list[str]) -> None:
    tests = sorted({test for outcomes in ran.values() for test in outcomes.table})
    report = {
        "tier": tier,
        "problems": found,
        "variants": {
            name: {
                "version": outcomes.version,
                "seconds": round(outcomes.seconds, 1),
                "counts": compare.counts(outcomes.table),
                "files": compare.by_file(outcomes.table, outcomes.spent),
            }
            for name, outcomes in ran.items()
        },
        "tests": {
            test: {name: o.table.get(test, compare.MISSING) for name, o in ran.items()}
            for test in tests
        },
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _print_summary(ran: dict[str, Outcomes], found: list[str]) -> None:
    for problem in found[:SHOWN]:
        print(f"FAIL {problem}")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more in report.json")
    for name, outcomes in ran.items():
        named = [
            test for test in outcomes.details if any(line.startswith(f"{test}:") for line in found)
        ]
        for test in named[:DETAILS]:
            print(
                f"--- {test} on {name}: {outcomes.table[test]}\n{outcomes.details[test].rstrip()}"
            )
    for name, outcomes in ran.items():
        print(_line(name, outcomes))
    print(f"{len(found)} problems" if found else "all variants end alike")


if __name__ == "__main__":
    sys.exit(main())
