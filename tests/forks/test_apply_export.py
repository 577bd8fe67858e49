# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.forks.fake_engine import SOURCE_FILES, Fork, edited, person

HOSTILE_CONFIG = """\
[user]
    name = Somebody Else
    email = else@example.org
[format]
    signature = sent from my machine
    numbered = true
    noprefix = true
    attach = true
[diff]
    noprefix = true
    mnemonicPrefix = true
    algorithm = patience
    context = 9
[core]
    autocrlf = true
    abbrev = 5
    hooksPath = /nonexistent
[apply]
    whitespace = fix
[commit]
    gpgSign = true
"""


def head(tree: Path) -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        command, cwd=tree, capture_output=True, text=True, check=True
    ).stdout.strip()


def two_patches(fork: Fork) -> None:
    fork.add_patch("[core] change one line, with an umlaut: ü", {"fakeng/core.py": edited(200)})
    fork.add_patch(
        "add, remove and touch other files",
        {
            "fakeng/old.py": None,
            "fakeng/elastic.py": "NEW = True\n",
            "fakeng/dos.py": "first = 1\r\nsecond = 3\r\n",
            "tests/test_core.py": "def test_nothing() -> None:\n    pass\n",
        },
    )


def test_round_trip_is_byte_identical(fork: Fork) -> None:
    two_patches(fork)
    first = fork.series()
    assert list(first) == [
        "0001-core-change-one-line-with-an-umlaut.patch",
        "0002-add-remove-and-touch-other-files.patch",
        "series",
    ]
    for _ in range(2):
        assert fork.apply("--force") == 0
        assert fork.export() == 0
        assert fork.series() == first


def test_nothing_of_the_machine_gets_in(
    fork: Fork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_patches(fork)
    first, first_head = fork.series(), head(fork.tree)
    # A rebuilt tree has the tools' commits; the one above has the contributor's own.
    assert fork.apply("--force") == 0
    rebuilt = head(fork.tree)
    assert rebuilt != first_head
    config = tmp_path / "gitconfig"
    config.write_text(HOSTILE_CONFIG)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_COMMITTER_NAME", "Somebody Else")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert fork.apply("--force") == 0
    assert fork.export() == 0
    assert fork.series() == first
    monkeypatch.delenv("GIT_DIR")
    assert head(fork.tree) == rebuilt


def test_patches_say_nothing_of_the_machine(fork: Fork) -> None:
    two_patches(fork)
    patch = fork.series()["0001-core-change-one-line-with-an-umlaut.patch"].decode()
    assert patch.startswith(f"From {'0' * 40} ")
    assert "Subject: [PATCH] [core] change one line, with an umlaut: ü\n" in patch
    assert "\n-- \n" not in patch
    assert " 1 file changed" not in patch


def test_base_is_every_file_of_the_release_unconverted(fork: Fork) -> None:
    assert fork.apply() == 0
    listed = subprocess.run(
        ["git", "ls-files"], cwd=fork.tree, capture_output=True, text=True, check=True
    )
    assert sorted(listed.stdout.split()) == sorted(SOURCE_FILES)
    for name, content in SOURCE_FILES.items():
        stored = subprocess.run(
            ["git", "cat-file", "blob", f"HEAD:{name}"],
            cwd=fork.tree,
            capture_output=True,
            check=True,
        )
        assert stored.stdout == content, name


@pytest.mark.parametrize("verb", ["apply", "build"])
def test_changed_context_is_refused(
    fork: Fork, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """patch(1) would take this with fuzz; here the context must match to the letter."""
    fork.add_patch("change one line", {"fakeng/core.py": edited(200)})
    (path,) = fork.patches.glob("*.patch")
    path.write_text(path.read_text().replace(" line_197 = 197\n", " line_197 = 198\n"))
    arguments = {
        "apply": ("--force", "--tree", str(fork.tree)),
        "build": ("--variant", "cpu", "--out", str(fork.root / "dist")),
    }
    assert fork.run(verb, *arguments[verb]) == 1
    error = capsys.readouterr().err
    assert f"{path.name} does not apply to" in error
    assert "exactly as written" in error


def test_failed_apply_leaves_the_patches_before_it(fork: Fork) -> None:
    two_patches(fork)
    (second,) = fork.patches.glob("0002-*")
    second.write_text(second.read_text().replace("-second = 2", "-second = 9"))
    assert fork.apply("--force") == 1
    assert "line" in (fork.tree / "fakeng" / "core.py").read_text()
    assert "changed = True" in (fork.tree / "fakeng" / "core.py").read_text()
    assert not (fork.tree / ".git" / "rebase-apply").exists()


def test_work_is_not_overwritten(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    assert fork.apply() == 0
    (fork.tree / "work").touch()
    assert fork.apply() == 1
    assert "--force" in capsys.readouterr().err
    assert (fork.tree / "work").exists()


def test_export_refuses_uncommitted_work(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    assert fork.apply() == 0
    (fork.tree / "fakeng" / "forgotten.py").touch()
    assert fork.export() == 1
    assert "forgotten.py" in capsys.readouterr().err


def test_export_refuses_a_merge(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    assert fork.apply() == 0
    steps = (
        "checkout --quiet -b side",
        "commit --quiet --allow-empty -m side",
        "checkout --quiet fork",
        "merge --quiet --no-ff -m merge side",
    )
    for step in steps:
        subprocess.run(["git", *step.split()], cwd=fork.tree, env=person(), check=True)
    assert fork.export() == 1
    assert "no merges" in capsys.readouterr().err


def test_export_needs_a_work_tree(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    assert fork.export() == 1
    assert "make one with `apply`" in capsys.readouterr().err


def test_dropped_and_renamed_patches_go(fork: Fork) -> None:
    two_patches(fork)
    (fork.patches / "README.md").write_text("stays\n")
    subprocess.run(["git", "reset", "--quiet", "--hard", "HEAD~1"], cwd=fork.tree, check=True)
    command = ["git", "commit", "--quiet", "--amend", "--message=another subject"]
    subprocess.run(command, cwd=fork.tree, env=person(), check=True)
    assert fork.export() == 0
    assert list(fork.series()) == ["0001-another-subject.patch", "README.md", "series"]
    assert fork.series()["series"] == b"0001-another-subject.patch\n"


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ("0001-a.patch\n", "disagree on: 0001-a.patch"),
        (None, "series is missing"),
    ],
)
def test_series_and_files_must_agree(
    fork: Fork, series: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (fork.patches / "series").unlink()
    if series is not None:
        (fork.patches / "series").write_text(series)
    assert fork.apply() == 1
    assert message in capsys.readouterr().err


def test_patch_named_twice_is_refused(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("change one line", {"fakeng/core.py": edited(200)})
    order = fork.patches / "series"
    order.write_text(order.read_text() * 2)
    assert fork.apply("--force") == 1
    assert "names a patch twice" in capsys.readouterr().err
