# SPDX-License-Identifier: Apache-2.0
"""The runner of the engine's own tests, on a fake engine with fake tests."""

from __future__ import annotations

import json
import tarfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from ci import compare, engine_tests, model_cache
from ci.manifest import Expectation, Manifest, ManifestError, TestFile, Variant, load
from ci.runner import Outcomes, RunError, Settings, copy_tests, run_variant, share_out

ENGINE = """
    import os
    __version__ = "{version}"
    BEHAVIOUR = "{behaviour}"
"""
TESTS = {
    "test_plain.py": """
        import os
        import pytest

        def test_engine_is_not_in_the_tree():
            assert not os.path.exists("vllm")

        @pytest.mark.parametrize("number", [1, 2])
        def test_numbers(number):
            assert number

        @pytest.mark.xfail(reason="wanted")
        def test_xfail():
            assert False

        def test_skipped():
            pytest.skip("no reason")

        def test_environment():
            assert "KVCACHED_STRAY" not in os.environ
            if os.environ.get("ENABLE_KVCACHED"):
                assert os.listdir(os.environ["KVCACHED_LEDGER_DIR"]) == []
    """,
    "deep/test_behaviour.py": """
        import atexit
        import os
        import time
        import pytest
        import vllm

        if vllm.BEHAVIOUR == "import":
            raise ImportError("no such thing")
        if vllm.BEHAVIOUR == "exit":
            atexit.register(os._exit, 11)
        if vllm.BEHAVIOUR == "start":
            os._exit(9)

        @pytest.fixture
        def fixture():
            assert vllm.BEHAVIOUR != "setup"
            yield
            assert vllm.BEHAVIOUR != "teardown"

        def test_before():
            pass

        def test_engine(fixture):
            if vllm.BEHAVIOUR == "crash":
                os._exit(3)
            if vllm.BEHAVIOUR == "hang":
                time.sleep(600)
            assert vllm.BEHAVIOUR != "fail"

        def test_engine_too():
            assert vllm.BEHAVIOUR != "fail"

        if vllm.BEHAVIOUR != "gone":
            def test_after():
                pass
    """,
}
MANIFEST = """
    [env]
    HF_HUB_OFFLINE = "1"
    [variant.stock]
    patched = false
    [variant.off]
    patched = true
    [variant.on]
    patched = true
    env = { ENABLE_KVCACHED = "true", KVCACHED_LEDGER_DIR = "{tmp}" }
    [tier.ci]
    "test_plain.py" = { passed = 4, seconds = 2.0 }
    [tier.full]
    "deep/test_behaviour.py" = { passed = 4, seconds = 1.0 }
"""
BEHAVIOUR = "deep/test_behaviour.py"
ENGINE_TEST = f"{BEHAVIOUR}::test_engine"


def _engine(folder: Path, version: str, behaviour: str = "good") -> Path:
    (folder / "vllm").mkdir(parents=True)
    text = textwrap.dedent(ENGINE).format(version=version, behaviour=behaviour)
    (folder / "vllm" / "__init__.py").write_text(text)
    return folder


def _patched(folder: Path, behaviour: str = "good") -> Path:
    return _engine(folder, "1.0+kvcached.1", behaviour)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "vllm-1.0"
    for name, text in TESTS.items():
        path = root / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    # What must not be imported: the tests belong to the engine that PYTHONPATH names.
    _engine(root, "the source tree's")
    return root


@pytest.fixture
def manifest_path(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.toml"
    path.write_text(textwrap.dedent(MANIFEST))
    return path


@pytest.fixture
def manifest(manifest_path: Path) -> Manifest:
    return load(manifest_path)


def _run(tmp_path: Path, source: Path, manifest: Manifest, behaviour: str) -> Outcomes:
    """Both files in one process, so that a death can take the other file's tests along."""
    tree, work, out = tmp_path / "tree", tmp_path / "work", tmp_path / "out"
    for folder in (tree, work, out):
        folder.mkdir()
    copy_tests(source, tree)
    settings = Settings(tree, work, out, manifest.env, jobs=1, test_limit_s=2.0)
    engine = _patched(tmp_path / "engine", behaviour)
    files = manifest.tiers["full"][::-1]
    return run_variant(manifest.variants["on"], engine, files, settings)


def test_every_kind_of_outcome(tmp_path: Path, source: Path, manifest: Manifest) -> None:
    ran = _run(tmp_path, source, manifest, "good")
    assert ran.version == "1.0+kvcached.1"
    assert ran.table == {
        "test_plain.py::test_engine_is_not_in_the_tree": "passed",
        "test_plain.py::test_numbers[1]": "passed",
        "test_plain.py::test_numbers[2]": "passed",
        "test_plain.py::test_xfail": "xfailed",
        "test_plain.py::test_skipped": "skipped",
        "test_plain.py::test_environment": "passed",
        f"{BEHAVIOUR}::test_before": "passed",
        f"{BEHAVIOUR}::test_engine": "passed",
        f"{BEHAVIOUR}::test_engine_too": "passed",
        f"{BEHAVIOUR}::test_after": "passed",
    }


@pytest.mark.parametrize(
    ("behaviour", "test", "outcome", "count"),
    [
        ("fail", ENGINE_TEST, "failed", 10),
        ("setup", ENGINE_TEST, "error", 10),
        ("teardown", ENGINE_TEST, "error", 10),
        ("crash", ENGINE_TEST, "crashed", 10),
        ("hang", ENGINE_TEST, "crashed", 10),
        ("import", BEHAVIOUR, "error", 7),
        ("exit", "on-1", "crashed", 11),
        ("start", "on-1", "crashed", 1),
    ],
)
def test_what_goes_wrong_is_recorded_and_the_rest_still_runs(
    tmp_path: Path,
    source: Path,
    manifest: Manifest,
    behaviour: str,
    test: str,
    outcome: str,
    count: int,
) -> None:
    ran = _run(tmp_path, source, manifest, behaviour)
    assert ran.table[test] == outcome
    assert ran.details[test]
    assert len(ran.table) == count
    if behaviour != "start":
        assert ran.table["test_plain.py::test_numbers[2]"] == "passed"


@pytest.fixture
def command(
    tmp_path: Path, source: Path, manifest_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setattr(model_cache, "build", lambda folder: folder)
    monkeypatch.setenv("KVCACHED_STRAY", "1")
    _engine(tmp_path / "stock", "1.0")
    manifest, out = str(manifest_path), str(tmp_path / "out")
    return ["--manifest", manifest, "--source", str(source), "--out", out, "--tier", "full"]


def _variants(
    tmp_path: Path, on: str, off: str = "good", names: Sequence[str] = ("stock", "off", "on")
) -> list[str]:
    _patched(tmp_path / "off", off)
    _patched(tmp_path / "on", on)
    return ["--variant", ",".join(f"{name}={tmp_path / name}" for name in names)]


def test_equal_variants_pass(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine_tests.main([*command, *_variants(tmp_path, "good")]) == 0
    assert "off (1.0+kvcached.1): 8 passed, 1 skipped, 1 xfailed" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["problems"] == []
    assert report["tests"][ENGINE_TEST] == {"stock": "passed", "off": "passed", "on": "passed"}
    assert report["variants"]["stock"]["files"][BEHAVIOUR]["passed"] == 4


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ("fail", f"{ENGINE_TEST}: failed on on, passed expected"),
        ("gone", f"{BEHAVIOUR}::test_after: missing on on, passed expected"),
        ("import", f"{BEHAVIOUR}: error on on, missing expected"),
    ],
)
def test_a_variant_that_differs_fails(
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    behaviour: str,
    line: str,
) -> None:
    assert engine_tests.main([*command, *_variants(tmp_path, behaviour)]) == 1
    assert f"FAIL {line}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ("good", "all variants end alike"),
        ("fail", f"FAIL {ENGINE_TEST}: failed on off"),
        ("gone", f"FAIL {BEHAVIOUR}: 3 passed, the manifest promises 4"),
        ("import", f"FAIL {BEHAVIOUR}: error on off"),
    ],
)
def test_off_is_measured_by_the_manifest_where_the_released_engine_is_not_run(
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    behaviour: str,
    line: str,
) -> None:
    """Also when both end alike."""
    variants = _variants(tmp_path, behaviour, behaviour, ("on", "off"))
    assert engine_tests.main([*command, *variants]) == (behaviour != "good")
    assert line in capsys.readouterr().out


def test_an_archive_serves_as_well_as_a_tree(tmp_path: Path, source: Path) -> None:
    archive = tmp_path / "vllm-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname="vllm-1.0")
    copy_tests(archive, tmp_path / "tree")
    taken = sorted(
        str(path.relative_to(tmp_path / "tree")) for path in tmp_path.rglob("tree/**/*.*")
    )
    assert taken == ["pyproject.toml", *(f"tests/{name}" for name in sorted(TESTS))]


@pytest.mark.parametrize(
    ("variants", "error"),
    [
        ("on={off}", "give stock or off, what the others are compared with"),
        ("stock={stock},other={off}", "other={off}: give stock, off, on"),
        ("stock={stock}/nowhere", "no such folder"),
        ("stock={off}", "is not the released engine"),
        ("stock={stock},off={stock}", "is not a patched engine"),
        ("stock={empty}", "cannot be imported"),
    ],
)
def test_a_wrong_engine_is_refused(
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variants: str,
    error: str,
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    names = {name: str(tmp_path / name) for name in ("stock", "off", "empty")}
    _patched(tmp_path / "off")
    (tmp_path / "empty" / "vllm").mkdir(parents=True)
    (tmp_path / "empty" / "vllm" / "__init__.py").write_text("raise ImportError\n")
    assert engine_tests.main([*command, "--variant", variants.format(**names)]) == 2
    assert error.format(**names) in capsys.readouterr().err


def test_a_file_that_the_source_lacks_is_refused(
    tmp_path: Path, command: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "tests" / "test_plain.py").unlink()
    assert engine_tests.main([*command, *_variants(tmp_path, "good")]) == 2
    assert "test_plain.py" in capsys.readouterr().err


# The comparison alone.

FILE = TestFile("a.py", passed=2, seconds=1.0)
STOCK = {"a.py::test_x": "passed", "a.py::test_y[1]": "passed", "a.py::test_y[2]": "skipped"}


def _problems(
    on: dict[str, str],
    differences: tuple[Expectation, ...] = (),
    known: tuple[Expectation, ...] = (),
    stock: dict[str, str] = STOCK,
) -> list[str]:
    variants = {"stock": Variant("stock", False), "on": Variant("on", True)}
    manifest = Manifest({}, variants, {"ci": (FILE,)}, known, differences)
    return compare.problems(manifest, [FILE], {"stock": stock, "on": on})


def _differs(test: str, expected: str) -> tuple[Expectation, ...]:
    return (Expectation(test, expected, "a reason", "on"),)


def test_equal_tables_have_no_problems() -> None:
    assert _problems(dict(STOCK)) == []


def test_missing_extra_and_changed_tests_are_problems() -> None:
    on = {"a.py::test_x": "failed", "a.py::test_y[2]": "skipped", "a.py::test_new": "passed"}
    assert _problems(on) == [
        "a.py::test_new: passed on on, missing expected (missing on stock)",
        "a.py::test_x: failed on on, passed expected (passed on stock)",
        "a.py::test_y[1]: missing on on, passed expected (passed on stock)",
    ]


def test_a_listed_difference_is_allowed_and_must_be_as_listed() -> None:
    on = {**STOCK, "a.py::test_x": "failed"}
    assert _problems(on, _differs("a.py::test_x", "failed")) == []
    assert len(_problems(on, _differs("a.py::test_x", "skipped"))) == 1


def test_a_stale_difference_is_a_problem() -> None:
    assert _problems(dict(STOCK), _differs("a.py::test_x", "passed")) == [
        "a.py::test_x: listed as a difference of on, but passed on both"
    ]
    assert len(_problems(dict(STOCK), _differs("a.py::test_x", "failed"))) == 1
    assert _problems(dict(STOCK), _differs("a.py::test_no", "failed")) == [
        "a.py::test_no: listed in the manifest, but there is no such test"
    ]


def test_an_entry_covers_all_parameters_of_its_test_but_no_other_test() -> None:
    on = {**STOCK, "a.py::test_y[1]": "failed", "a.py::test_y[2]": "failed"}
    assert _problems(on, _differs("a.py::test_y", "failed")) == []
    assert _problems(on, _differs("a.py::test_y[1]", "failed")) == [
        "a.py::test_y[2]: failed on on, skipped expected (skipped on stock)"
    ]
    assert not Expectation("a.py::test_y", "failed", "a reason").covers("a.py::test_yes")


def test_entries_about_other_files_and_variants_do_not_matter() -> None:
    entries = (
        Expectation("b.py::test_x", "failed", "a reason", "on"),
        Expectation("a.py::test_x", "failed", "a reason", "off"),
    )
    assert _problems(dict(STOCK), entries) == []


def test_the_released_engine_must_pass_unless_known_not_to() -> None:
    broken = {**STOCK, "a.py::test_z": "failed"}
    known = (Expectation("a.py::test_z", "failed", "needs a GPU"),)
    assert _problems(broken, stock=broken) == ["a.py::test_z: failed on stock"]
    assert _problems(broken, stock=broken, known=known) == []
    mended = {**STOCK, "a.py::test_z": "passed"}
    assert _problems(mended, stock=mended, known=known) == [
        "a.py::test_z: known as failed, but passed on stock"
    ]


def test_too_few_passes_are_a_problem_even_if_equal() -> None:
    idle = {**STOCK, "a.py::test_x": "skipped"}
    assert _problems(idle, stock=idle) == ["a.py: 1 passed, the manifest promises 2"]


# The manifest.


def test_a_later_tier_holds_the_earlier_and_replaces_rows(manifest_path: Path) -> None:
    manifest_path.write_text(
        manifest_path.read_text() + '"test_plain.py" = { passed = 5, seconds = 2.0 }\n'
    )
    tiers = load(manifest_path).tiers
    assert [(file.path, file.passed) for file in tiers["ci"]] == [("test_plain.py", 4)]
    assert [(file.path, file.passed) for file in tiers["full"]] == [
        ("test_plain.py", 5),
        (BEHAVIOUR, 4),
    ]


def test_deselected_tests_are_not_run(tmp_path: Path, source: Path, manifest_path: Path) -> None:
    text = manifest_path.read_text().replace(
        "seconds = 1.0", 'seconds = 1.0, deselect = ["test_e"]'
    )
    manifest_path.write_text(text)
    ran = _run(tmp_path, source, load(manifest_path), "fail")
    assert len(ran.table) == 8
    assert set(ran.table.values()) == {"passed", "skipped", "xfailed"}


@pytest.mark.parametrize(
    ("table", "test", "fields"),
    [
        ("difference", "test_plain.py::t", {"variant": "on", "expected": "failed", "reason": " "}),
        ("difference", "test_plain.py::t", {"variant": "so", "expected": "failed", "reason": "r"}),
        ("difference", "test_plain.py::t", {"expected": "failed", "reason": "r"}),
        ("difference", "test_other.py::t", {"variant": "on", "expected": "failed", "reason": "r"}),
        ("known", "test_plain.py::t", {"variant": "on", "expected": "failed", "reason": "r"}),
        ("known", "test_plain.py::t", {"expected": "failed"}),
        ("surprise", "test_plain.py::t", {}),
    ],
)
def test_a_wrong_manifest_is_refused(
    manifest_path: Path, table: str, test: str, fields: dict[str, str]
) -> None:
    rows = "".join(f'{key} = "{value}"\n' for key, value in {"test": test, **fields}.items())
    manifest_path.write_text(f"{manifest_path.read_text()}\n[[{table}]]\n{rows}")
    with pytest.raises(ManifestError):
        load(manifest_path)


def test_the_manifests_in_the_repository_are_sound() -> None:
    manifests = sorted(Path(engine_tests.HERE).glob("*.toml"))
    assert manifests
    for path in manifests:
        manifest = load(path)
        assert manifest.baseline == "stock"
        assert {"ci", "full"} <= set(manifest.tiers)
        assert all(file.passed > 0 for file in manifest.tiers["full"])


def test_files_are_shared_out_evenly_and_always_alike() -> None:
    files = [TestFile(f"{n}.py", 1, seconds) for n, seconds in enumerate([1, 5, 2, 2])]
    groups = share_out(files, 2)
    assert [[file.path for file in group] for group in groups] == [
        ["1.py"],
        ["0.py", "2.py", "3.py"],
    ]
    assert share_out(files, 8) == [[file] for file in (files[1], files[2], files[3], files[0])]


def test_a_source_without_tests_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "empty.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    with pytest.raises(RunError):
        copy_tests(archive, tmp_path)
