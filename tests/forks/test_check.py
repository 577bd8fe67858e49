# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from engine_forks.check import BUDGET, TRAILERS
from tests.forks.fake_engine import CORE, Fork, edited, good_trailers, make_wheel, write_pin


def changed_lines(count: int) -> str:
    """core.py with `count` changed lines, each counting twice: one removed, one added."""
    lines = CORE.splitlines(keepends=True)
    return "".join([f"other_{n} = {n}\n" for n in range(count)] + lines[count:])


def problems(fork: Fork, capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    capsys.readouterr()
    code = fork.run("check", *args)
    lines = capsys.readouterr().err.splitlines()
    assert code == (1 if lines else 0)
    return lines


def test_good_series_passes_and_is_counted(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("one", {"fakeng/core.py": edited(3), "fakeng/elastic.py": "A = 1\nB = 2\n"})
    fork.add_patch("two", {"fakeng/core.py": edited(3).replace("line_9 ", "line_nine ")})
    capsys.readouterr()
    assert fork.run("check", "--variant", "cpu", "--variant", "cuda") == 0
    output = capsys.readouterr()
    assert output.err == ""
    rows = [line.split() for line in output.out.splitlines()]
    assert rows[1] == ["2", "2", "0001-one.patch"]
    assert rows[2] == ["2", "0", "0002-two.patch"]
    assert rows[3][:3] == ["4", "of", str(BUDGET)]


def test_budget_is_exact(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("all that is allowed", {"fakeng/core.py": changed_lines(BUDGET // 2)})
    assert problems(fork, capsys) == []
    fork.add_patch("one line more", {"fakeng/__init__.py": "from fakeng import core\n"})
    (problem,) = problems(fork, capsys)
    assert f"changes {BUDGET + 2} lines of existing files, the budget is {BUDGET}" in problem


def test_new_files_are_free(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("a large new file", {"fakeng/elastic.py": "x = 1\n" * (BUDGET + 1)})
    fork.add_patch("changed later", {"fakeng/elastic.py": "y = 1\n" * (BUDGET + 1)})
    assert problems(fork, capsys) == []


@pytest.mark.parametrize("trailer", TRAILERS)
def test_each_trailer_is_required(
    fork: Fork, trailer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fork.add_patch("one", {"fakeng/core.py": edited(3)}, body=good_trailers(leave_out=trailer))
    assert problems(fork, capsys) == [f"error: 0001-one.patch: no {trailer}: trailer"]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("tests/test_gone.py", "names tests/test_gone.py, which exists in neither"),
        ("by hand", "names no test file"),
    ],
)
def test_named_tests_must_exist(
    fork: Fork, tests: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body = good_trailers().replace("tests/test_core.py::test_nothing", tests)
    fork.add_patch("one", {"fakeng/core.py": edited(3)}, body=body)
    (problem,) = problems(fork, capsys)
    assert message in problem


def test_own_tests_count_too(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    own = fork.root / "tests" / "e2e" / "test_own.py"
    own.parent.mkdir(parents=True)
    own.touch()
    body = good_trailers().replace("Tests: ", "Tests: tests/e2e/test_own.py, ")
    fork.add_patch("one", {"fakeng/core.py": edited(3)}, body=body)
    assert problems(fork, capsys) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Date: ", "Date:  "),
        ("@@ -1,5 +1,5 @@", "@@ -2,5 +2,5 @@"),
        (f"From {'0' * 40}", f"From {'1' * 40}"),
    ],
)
def test_hand_edited_patch_is_found(
    fork: Fork, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fork.add_patch("one", {"fakeng/core.py": edited(1)})
    (path,) = fork.patches.glob("*.patch")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    found = problems(fork, capsys)
    assert found == ["error: 0001-one.patch: differs from what `export` writes:"
                     " run `apply`, then `export`"]  # fmt: skip


def test_order_file_is_as_exported(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("one", {"fakeng/core.py": edited(1)})
    order = fork.patches / "series"
    order.write_text("# a remark\n" + order.read_text())
    assert problems(fork, capsys) == ["error: series: differs from what `export` writes"]


@pytest.mark.parametrize("path", ["csrc/kernel.cu", "fakeng/data.json", "setup.py"])
def test_only_python_of_the_package_can_be_patched(
    fork: Fork, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fork.add_patch("one", {path: "changed\n"})
    (problem,) = problems(fork, capsys)
    assert f"changes {path}; only Python in fakeng/ and tests/ can be patched" in problem


def test_every_step_is_valid_python(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("broken", {"fakeng/elastic.py": "def (:\n"})
    fork.add_patch("mended", {"fakeng/elastic.py": "GOOD = 1\n"})
    (problem,) = problems(fork, capsys)
    assert problem.startswith("error: 0001-broken.patch: fakeng/elastic.py:1: ")


def test_series_that_does_not_apply(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("one", {"fakeng/core.py": edited(1)})
    (path,) = fork.patches.glob("*.patch")
    path.write_text(path.read_text().replace("-line_1 = 1", "-line_1 = 2"))
    assert "does not apply" in problems(fork, capsys)[0]


def test_wheel_must_take_the_patches_too(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    """A release's wheel and source archive are two builds, and need not hold the same Python."""
    fork.add_patch("one", {"fakeng/core.py": edited(1)})
    other = make_wheel("cpu", {"fakeng/core.py": edited(2, "other = 1").encode()})
    fork.wheel("cpu").write_bytes(other)
    write_pin(fork)
    assert problems(fork, capsys) == []
    assert problems(fork, capsys, "--variant", "cuda") == []
    found = problems(fork, capsys, "--variant", "cpu")
    assert "0001-one.patch does not apply to fakeng_cpu-1.2.0-py3-none-any.whl" in found[0]
