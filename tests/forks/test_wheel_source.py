# SPDX-License-Identifier: Apache-2.0
"""An engine that is released as wheels only: one for each Python, the same one for a CPU."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from engine_forks.apply import unpack
from engine_forks.errors import ForkError
from engine_forks.wheel import wheel_identity
from tests.forks.fake_engine import (
    BINARY,
    PYTHONS,
    SOURCE_FILES,
    Fork,
    edited,
    good_trailers,
    make_wheel,
    python_wheel,
    write_wheel_pin,
)

# The engine's own tests are in its package, if anywhere.
TRAILERS = good_trailers().replace("tests/test_core.py::test_nothing", "fakeng/core.py")
PATCHED = edited(5).replace("line_300 = 300\n", "changed = True\n")
PACKAGE = {name: data for name, data in SOURCE_FILES.items() if name.startswith("fakeng/")}
CUDA = f"fakeng-1.2.0+kvcached.7-{PYTHONS[1]}-none-any.whl"
CPU = f"fakeng-1.2.0+kvcached.7.cpu-{PYTHONS[1]}-none-any.whl"


@pytest.fixture
def patched(wheel_fork: Fork) -> Fork:
    changes: dict[str, str | None] = {
        "fakeng/core.py": edited(5),
        "fakeng/elastic.py": "A = 1\n",
        "fakeng/old.py": None,
    }
    wheel_fork.add_patch("change, add and remove", changes, body=TRAILERS)
    changes = {"fakeng/core.py": PATCHED, "fakeng/dos.py": "first = 1\r\nsecond = 3\r\n"}
    wheel_fork.add_patch("change again", changes, body=TRAILERS)
    return wheel_fork


def git(tree: Path, *args: str) -> bytes:
    return subprocess.run(["git", *args], cwd=tree, capture_output=True, check=True).stdout


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head = archive.read(name).decode().partition("\n\n")[0]
    lines = [line.partition(": ") for line in head.split("\n")]
    return [value for key, _, value in lines if key == "Requires-Dist"]


def test_tree_is_the_package_without_compiled_files(wheel_fork: Fork) -> None:
    assert wheel_fork.apply() == 0
    assert set(git(wheel_fork.tree, "ls-files").decode().split()) == set(PACKAGE)
    for name, content in PACKAGE.items():
        assert git(wheel_fork.tree, "cat-file", "blob", f"base:{name}") == content, name


def test_any_python_s_wheel_is_the_same_source(wheel_fork: Fork) -> None:
    """So what a patch says does not depend on which wheel the pin calls the source."""
    bases = []
    for python in PYTHONS:
        write_wheel_pin(wheel_fork, source=python)
        assert wheel_fork.apply("--force") == 0
        bases.append(git(wheel_fork.tree, "rev-parse", "base"))
    assert bases[0] == bases[1]


def test_executable_files_stay_so(wheel_fork: Fork) -> None:
    wheel = python_wheel(wheel_fork, PYTHONS[0])
    wheel.write_bytes(make_wheel("cuda", {"fakeng/tool.sh": b"#!/bin/sh\n"}))
    write_wheel_pin(wheel_fork)
    assert wheel_fork.apply() == 0
    rows = git(wheel_fork.tree, "ls-tree", "-r", "base").decode().splitlines()
    assert {row.split()[3]: row.split()[0] for row in rows} == {
        **dict.fromkeys(PACKAGE, "100644"),
        "fakeng/tool.sh": "100755",
    }


def test_empty_series_is_whole(wheel_fork: Fork) -> None:
    before = wheel_fork.series()
    assert before == {"series": b""}
    assert wheel_fork.apply() == 0
    assert wheel_fork.export() == 0
    assert wheel_fork.series() == before
    assert wheel_fork.run("check", "--variant", "cpu", "--variant", "cuda") == 0


def test_round_trip_is_byte_identical(patched: Fork) -> None:
    first = patched.series()
    assert list(first) == [
        "0001-change-add-and-remove.patch",
        "0002-change-again.patch",
        "series",
    ]
    for _ in range(2):
        assert patched.apply("--force") == 0
        assert patched.export() == 0
        assert patched.series() == first


@pytest.mark.parametrize("verb", ["apply", "build"])
def test_changed_context_is_refused(
    patched: Fork, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = patched.patches / "0002-change-again.patch"
    path.write_text(path.read_text().replace(" line_298 = 298\n", " line_298 = 299\n"))
    arguments = {
        "apply": ("--force", "--tree", patched.tree),
        "build": ("--out", patched.root / "dist"),
    }
    assert patched.run(verb, *arguments[verb]) == 1
    assert "exactly as written" in capsys.readouterr().err


def test_check_counts_and_passes(patched: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert patched.run("check", "--variant", "cpu", "--variant", "cuda") == 0
    output = capsys.readouterr()
    assert output.err == ""
    # core.py: one line for another; old.py: one line less. elastic.py is new.
    assert output.out.splitlines()[1].split() == ["3", "1", "0001-change-add-and-remove.patch"]


@pytest.mark.parametrize(("variant", "name"), [("cuda", CUDA), ("cpu", CPU)])
def test_build_takes_this_python_s_wheel(patched: Fork, variant: str, name: str) -> None:
    out = patched.root / "dist"
    assert patched.run("build", "--variant", variant, "--out", out) == 0
    (wheel,) = out.iterdir()
    assert wheel.name == name
    version = wheel_identity(wheel)[1]
    local = version.partition("+")[2]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("fakeng/core.py") == PATCHED.encode()
        assert archive.read("fakeng/native.so") == PYTHONS[1].encode() + BINARY
        stated = archive.read("fakeng/_version.py").decode()
    assert f"'{version}'" in stated
    assert f"(1, 2, 0, '{local}')" in stated


def test_another_python_s_wheel_can_be_asked_for(
    patched: Fork, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert patched.run("fetch", "source", "cpu", "--python", PYTHONS[0]) == 0
    wheel = patched.cache / python_wheel(patched, PYTHONS[0]).name
    assert capsys.readouterr().out.split() == [str(wheel), str(wheel)]
    assert patched.run("fetch", "cpu", "--python", "cp27") == 1
    known = ", ".join(sorted(PYTHONS))
    assert f"cpu is not released for 'cp27'; for: {known}" in capsys.readouterr().err


def test_variant_states_its_own_requirements(
    wheel_fork: Fork, capsys: pytest.CaptureFixture[str]
) -> None:
    built = {}
    for variant in ("cuda", "cpu"):
        out = wheel_fork.root / variant
        assert wheel_fork.run("build", "--variant", variant, "--out", out) == 0
        (wheel,) = out.iterdir()
        built[variant] = requirements(wheel)
    torch, core = 'torch==2.11.0; platform_machine != "s390x"', "kvcached-core>=0.1"
    extra = 'pandas; extra == "bench"'
    six = 'six>=1.16.0; python_version > "3.11"'
    assert built["cuda"] == [torch, "torchvision", six, core, extra]
    assert built["cpu"] == [torch, core, "six==1.17", "attrs", extra]
    capsys.readouterr()
    assert wheel_fork.run("requirements", "--variant", "cpu") == 0
    assert capsys.readouterr().out.splitlines() == ["torch==2.11.0", "six==1.17", "attrs"]


@pytest.mark.parametrize("verb", ["build", "check", "requirements"])
def test_drop_of_what_is_not_required_is_found(
    wheel_fork: Fork, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An extra's requirement is none of the engine's."""
    write_wheel_pin(wheel_fork, cpu='drops = ["torchvision", "pandas", "gone"]\n')
    assert wheel_fork.run(verb, "--variant", "cpu") == 1
    assert "does not require what is dropped: gone, pandas" in capsys.readouterr().err


def test_rebase_onto_a_wheel(
    patched: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(patched.root)
    onto = patched.root / "fakeng-1.3.0-py3-none-any.whl"
    # Within the second patch's context, but beside its line.
    onto.write_bytes(make_wheel("cuda", {"fakeng/core.py": edited(302, "theirs = 1").encode()}))
    assert patched.run("rebase", "--archive", onto) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if ".patch" in line]
    assert rows == ["exact", "merged"]
    tree = patched.root / "build" / "forks" / "fakeng-1.3.0"
    assert "theirs = 1\n" in (tree / "fakeng" / "core.py").read_text()
    assert not (tree / "fakeng" / "native.so").exists()


def test_wheel_without_the_package_is_refused(wheel_fork: Fork) -> None:
    with pytest.raises(ForkError, match=r"cp39-none-any\.whl has no other/"):
        unpack(python_wheel(wheel_fork, PYTHONS[0]), wheel_fork.tree, "other")
    assert not wheel_fork.tree.exists()
