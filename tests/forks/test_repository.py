# SPDX-License-Identifier: Apache-2.0
"""What the Dockerfiles and the CI entry name must exist here; neither can run in a unit test."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from engine_forks.__main__ import _parser
from engine_forks.pin import REPO, load_pin, pin_names
from engine_forks.series import read_series

DOCKERFILES = sorted((REPO / "engine_forks" / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined and comments left out."""
    lines = [x for x in path.read_text().splitlines() if not x.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    parts = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(word, arguments.strip()) for word, _, arguments in parts]


def run_commands(path: Path) -> list[list[str]]:
    """The commands of all RUN instructions, without BuildKit's own options."""
    commands = []
    for word, arguments in instructions(path):
        if word == "RUN":
            for command in re.split(r"&&|\|\||;", arguments):
                words = shlex.split(command)
                commands.append([x for x in words if not x.startswith("--mount=")])
    return commands


def test_each_variant_of_each_pin_has_a_dockerfile() -> None:
    expected = {
        f"{name}.{variant}.Dockerfile"
        for name in pin_names()
        for variant in load_pin(name).variants
    }
    assert {path.name for path in DOCKERFILES} == expected


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_what_exists(path: Path) -> None:
    copied = [shlex.split(arguments) for word, arguments in instructions(path) if word == "COPY"]
    sources = [source for words in copied for source in words[:-1]]
    assert {"csrc", "kvcached_core", "engine_forks", "patches"} <= set(sources)
    sent = (REPO / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert (REPO / source).exists(), source
        assert f"!{source}" in sent, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_calls_the_tools_as_they_are(path: Path) -> None:
    calls = [words[1:] for words in run_commands(path) if words[:2] == ["python", "-m"]]
    assert calls
    for _, module, *arguments in calls:
        assert importlib.util.find_spec(module) is not None, module
        parsed = _parser().parse_args(arguments)
        pin = load_pin(parsed.pin)
        # The file's own name says what it builds.
        assert f"{pin.name}.{parsed.variant}.Dockerfile" == path.name
        assert pin.wheel(parsed.variant, "x86_64")
    (usage,) = re.findall(r"^#\s+docker build -f (\S+)", path.read_text(), re.MULTILINE)
    assert REPO / usage == path


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_uses_known_instructions_and_stages(path: Path) -> None:
    known = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT"}
    words = [word for word, _ in instructions(path)]
    assert set(words) <= known
    assert words.count("FROM") == 2
    stages = {
        arguments.split()[-1] for word, arguments in instructions(path) if " AS " in arguments
    }
    for used in re.findall(r"from=(\w+)", path.read_text()):
        assert used in stages
    # The last user is the one that the engine runs as.
    assert [arguments for word, arguments in instructions(path) if word == "USER"][-1] == "engine"


def test_ci_entry_runs() -> None:
    entry = REPO / ".ci" / "run"
    assert os.access(entry, os.X_OK)
    assert "set -euo pipefail" in entry.read_text()
    subprocess.run(["bash", "-n", str(entry)], check=True)


@pytest.mark.parametrize("name", pin_names())
def test_series_on_disk_is_whole(name: str) -> None:
    for patch in read_series(load_pin(name).patches):
        assert patch.is_file()
