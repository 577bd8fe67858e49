# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of one variant of the engine in a few pytest processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ci.manifest import TestFile, Variant

PLUGIN = Path(__file__).resolve().parent / "plugin"
FORK_MARK = "+kvcached"
TESTS = "tests/"
# Settings of the caller's that would change what the tests see.
SCRUBBED = ("VLLM_", "KVCACHED_", "ENABLE_KVCACHED", "PYTEST_", "HF_")
# Beyond one test's limit: collecting imports the engine, and an engine can be slow to stop.
STALL_SLACK_S = 120.0
# All passed, some failed, none left to run (after a crash in the last test).
PYTEST_CODES = (0, 1, 5)


class RunError(Exception):
    """The variant cannot be run at all."""


@dataclass(frozen=True)
class Settings:
    tree: Path  # the engine's tests, without the engine
    work: Path  # short, since sockets lie in it
    out: Path
    env: dict[str, str]
    jobs: int
    test_limit_s: float = 300.0


@dataclass
class Outcomes:
    version: str = ""
    seconds: float = 0.0
    table: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)  # of what went wrong, or was skipped
    spent: dict[str, float] = field(default_factory=dict)  # seconds

    def add(self, other: Outcomes) -> None:
        self.table.update(other.table)
        self.details.update(other.details)
        self.spent.update(other.spent)


def copy_tests(source: Path, target: Path) -> None:
    """Takes the tests and pytest's settings, but not the engine, out of a release's source."""
    if source.is_dir():
        shutil.copytree(source / "tests", target / "tests")
        shutil.copy(source / "pyproject.toml", target)
        return
    with tarfile.open(source) as archive:
        # Unknown to Python 3.11.3 and older; the source has the pinned hash anyway.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        for member in archive:
            inner = member.name.partition("/")[2]
            if inner == "pyproject.toml" or inner.startswith(TESTS):
                member.name = inner
                archive.extract(member, target)
    if not (target / "tests").is_dir():
        raise RunError(f"{source} holds no tests/")


def share_out(files: Sequence[TestFile], groups: int) -> list[list[TestFile]]:
    """Groups of about equal time, each in the files' own order.

    The same for every variant, so that a test always has the same neighbours in its process.
    """
    load = [0.0] * groups
    member: dict[str, int] = {}
    for file in sorted(files, key=lambda file: -file.seconds):
        lightest = load.index(min(load))
        load[lightest] += file.seconds
        member[file.path] = lightest
    shared = [[file for file in files if member[file.path] == group] for group in range(groups)]
    return [group for group in shared if group]


def run_variant(
    variant: Variant, engine: Path | None, files: Sequence[TestFile], settings: Settings
) -> Outcomes:
    outcomes = Outcomes(version=_check_engine(variant, engine, settings))
    began = time.monotonic()
    groups = share_out(files, settings.jobs)
    with ThreadPoolExecutor(len(groups)) as pool:
        done = [
            pool.submit(_run_group, f"{variant.name}-{number}", variant, engine, group, settings)
            for number, group in enumerate(groups, 1)
        ]
        for group in done:
            outcomes.add(group.result())
    outcomes.seconds = time.monotonic() - began
    return outcomes


def _environment(
    variant: Variant, engine: Path | None, settings: Settings, tmp: Path
) -> dict[str, str]:
    path = [*([engine] if engine else []), PLUGIN, os.environ.get("PYTHONPATH", "")]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(SCRUBBED)},
        **settings.env,
        **{name: value.format(tmp=tmp) for name, value in variant.env.items()},
        "PYTHONPATH": os.pathsep.join(str(part) for part in path if str(part)),
        "TMPDIR": str(tmp),
        # What one variant caches must not serve another.
        "VLLM_CACHE_ROOT": str(settings.work / f"{variant.name}-vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(settings.work / f"{variant.name}-inductor"),
    }


def _check_engine(variant: Variant, engine: Path | None, settings: Settings) -> str:
    """Its version, once it is sure that it is the engine meant that the tests will import."""
    code = "import vllm; print(vllm.__file__); print(vllm.__version__)"
    with tempfile.TemporaryDirectory(dir=settings.work) as tmp:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=settings.tree,
            env=_environment(variant, engine, settings, Path(tmp)),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RunError(f"{variant.name}: the engine cannot be imported:\n{done.stderr}")
    location, version = done.stdout.splitlines()[-2:]
    if engine is not None and engine.resolve() not in Path(location).resolve().parents:
        raise RunError(f"{variant.name}: the engine comes from {location}, not from {engine}")
    if (FORK_MARK in version) != variant.patched:
        kind = "a patched" if variant.patched else "the released"
        raise RunError(f"{variant.name}: {version} in {location} is not {kind} engine")
    return version


def _run_group(
    name: str,
    variant: Variant,
    engine: Path | None,
    files: Sequence[TestFile],
    settings: Settings,
) -> Outcomes:
    """Runs one group, in a new process from where it stopped each time that one dies."""
    tmp = settings.work / name
    tmp.mkdir(mode=0o700)
    record = settings.out / f"{name}.jsonl"
    record.unlink(missing_ok=True)
    env = _environment(variant, engine, settings, tmp)
    env["ENGINE_TESTS_LOG"] = str(record)
    env["ENGINE_TESTS_LIMIT_S"] = str(settings.test_limit_s)
    command = [sys.executable, "-m", "pytest", *_pytest_arguments(files, settings.tree)]
    before = -1
    with (settings.out / f"{name}.log").open("w", encoding="utf-8") as log:
        while True:
            code = _run_process(command, settings, env, log.fileno(), record)
            outcomes, ended = read_record(record)
            if ended or len(outcomes.table) == before:
                break
            before = len(outcomes.table)
    if not ended or code not in PYTEST_CODES:
        # It dies outside of any test: at the start, where it would again, or at the very end.
        outcomes.table[name] = "crashed"
        outcomes.details[name] = f"pytest ended with {code}; see {log.name}"
    return outcomes


def _pytest_arguments(files: Sequence[TestFile], tree: Path) -> list[str]:
    plugins = ["-p", "engine_tests_recorder", "-p", "no:cacheprovider"]
    # The environment has them for tests of our own, and they take two seconds to import.
    plugins += ["-p", "no:schemathesis", "-p", "no:hypothesispytest"]
    place = ["--rootdir", str(tree), "-c", str(tree / "pyproject.toml")]
    left_out = [
        argument
        for file in files
        for prefix in file.deselect
        for argument in ("--deselect", f"{TESTS}{file.path}::{prefix}")
    ]
    paths = [f"{TESTS}{file.path}" for file in files]
    quiet = ["-v", "--tb=short", "--disable-warnings"]
    # A file that cannot be imported is one error, not the end of all others.
    return [*plugins, *place, *quiet, "--continue-on-collection-errors", *left_out, *paths]


def _run_process(
    command: list[str], settings: Settings, env: dict[str, str], log: int, record: Path
) -> int:
    """The exit code of `command`, which is stopped when its record no longer grows."""
    process = subprocess.Popen(
        command, cwd=settings.tree, env=env, stdout=log, stderr=log, start_new_session=True
    )
    size, since = -1, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            grown = record.stat().st_size if record.exists() else -1
            if grown != size:
                size, since = grown, time.monotonic()
            if time.monotonic() - since > settings.test_limit_s + STALL_SLACK_S:
                break
    finally:
        # With whatever its tests left running: the process leads a group of its own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def read_record(record: Path) -> tuple[Outcomes, bool]:
    """What was recorded, and whether the last session came to its end."""
    outcomes, ended = Outcomes(), False
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    for line in text.splitlines():
        entry = json.loads(line)
        test = entry["test"].removeprefix(TESTS)
        if not test:
            ended = True
            continue
        outcomes.table[test] = entry["outcome"]
        outcomes.details[test] = entry["detail"]
        outcomes.spent[test] = entry["seconds"]
    outcomes.details = {test: text for test, text in outcomes.details.items() if text}
    return outcomes, ended
