# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.forks.fake_engine import Fork, edited, make_archive, person


@pytest.fixture
def rebased(fork: Fork, tmp_path: Path) -> tuple[Fork, Path, Path]:
    """Three patches, and where the next release and its work tree are to be."""
    fork.add_patch("exact", {"fakeng/dos.py": "first = 1\r\nsecond = 3\r\n"})
    fork.add_patch("merged", {"fakeng/core.py": edited(10)})
    fork.add_patch("conflict", {"fakeng/__init__.py": "X = 1\n"})
    fork.add_patch("last", {"fakeng/elastic.py": "NEW = 1\n"})
    return fork, tmp_path / "fakeng-1.3.0.tar.gz", tmp_path / "rebased"


def outcomes(text: str) -> list[tuple[str, str]]:
    rows = (line.split() for line in text.splitlines() if ".patch" in line)
    return [(row[0], row[1].removesuffix(".patch")) for row in rows]


def test_reports_every_patch_and_stops_for_the_person(
    rebased: tuple[Fork, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fork, archive, tree = rebased
    changes: dict[str, bytes | None] = {
        # Within the patch's context but beside its line: only a three-way merge takes that.
        "fakeng/core.py": edited(12, "upstream = True").encode(),
        "fakeng/__init__.py": b"something = 'else'\n",
    }
    archive.write_bytes(make_archive(changes, version="1.3.0"))
    capsys.readouterr()
    code = fork.run("rebase", "--archive", archive, "--tree", tree)
    output = capsys.readouterr().out
    assert code == 1
    assert outcomes(output) == [
        ("exact", "0001-exact"),
        ("merged", "0002-merged"),
        ("conflict", "0003-conflict"),
        ("exact", "0004-last"),
    ]
    assert "fakeng/__init__.py" in output
    assert "1 of 4 patches need a person" in output

    # The person mends the file and goes on as git says; the rest of the series is still queued.
    assert "<<<<<<<" in (tree / "fakeng" / "__init__.py").read_text()
    (tree / "fakeng" / "__init__.py").write_text("something = 'else'\nX = 1\n")
    for command in (["add", "--all"], ["am", "--continue"]):
        subprocess.run(["git", *command], cwd=tree, env=person(), check=True, capture_output=True)
    assert (tree / "fakeng" / "elastic.py").exists()
    assert fork.run("export", "--tree", tree) == 0
    order = ["0001-exact", "0002-merged", "0003-conflict", "0004-last"]
    assert fork.series()["series"].decode().splitlines() == [f"{name}.patch" for name in order]


def test_all_patches_apply(
    rebased: tuple[Fork, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fork, archive, tree = rebased
    archive.write_bytes(make_archive({"fakeng/new_upstream.py": b"U = 1\n"}, version="1.3.0"))
    assert fork.run("rebase", "--archive", archive, "--tree", tree) == 0
    assert "all 4 patches apply" in capsys.readouterr().out
    assert (tree / "fakeng" / "elastic.py").read_text() == "NEW = 1\n"
    assert (tree / "fakeng" / "new_upstream.py").exists()


def test_patch_on_a_patched_file_is_merged(
    fork: Fork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the second patch was made on is in neither release, only in the series."""
    both = edited(10).replace("line_300 = 300\n", "changed = True\n")
    fork.add_patch("one", {"fakeng/core.py": edited(10)})
    fork.add_patch("two", {"fakeng/core.py": both})
    archive, tree = tmp_path / "fakeng-1.3.0.tar.gz", tmp_path / "rebased"
    changes: dict[str, bytes | None] = {"fakeng/core.py": edited(302, "theirs = 1").encode()}
    archive.write_bytes(make_archive(changes, version="1.3.0"))
    capsys.readouterr()
    assert fork.run("rebase", "--archive", archive, "--tree", tree) == 0
    assert outcomes(capsys.readouterr().out) == [("exact", "0001-one"), ("merged", "0002-two")]
    assert (tree / "fakeng" / "core.py").read_text() == both.replace(
        "line_302 = 302\n", "theirs = 1\n"
    )


def test_files_the_next_release_dropped_are_gone(rebased: tuple[Fork, Path, Path]) -> None:
    fork, archive, tree = rebased
    archive.write_bytes(make_archive({"csrc/kernel.cu": None}, version="1.3.0"))
    assert fork.run("rebase", "--archive", archive, "--tree", tree) == 0
    assert not (tree / "csrc").exists()


def test_work_is_not_overwritten(
    rebased: tuple[Fork, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fork, archive, tree = rebased
    archive.write_bytes(make_archive(version="1.3.0"))
    tree.mkdir()
    assert fork.run("rebase", "--archive", archive, "--tree", tree) == 1
    assert "may hold work" in capsys.readouterr().err
