# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import csv
import hashlib
import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from engine_forks.build import edit_version_file
from engine_forks.errors import ForkError
from engine_forks.pin import load_pin
from engine_forks.wheel import Rewrite, edit_metadata, wheel_identity
from tests.forks.fake_engine import BINARY, PIN, Fork, edited, make_wheel, wheel_name, write_pin

FORK_VERSION = "1.2.0+kvcached.7"


@pytest.fixture
def patched(fork: Fork) -> Fork:
    """A fork whose series changes, adds and removes files, and a test that no wheel has."""
    fork.add_patch("change and add", {"fakeng/core.py": edited(5), "fakeng/elastic.py": "A = 1\n"})
    fork.add_patch(
        "change again and remove",
        {"fakeng/elastic.py": "A = 2\n", "fakeng/old.py": None, "tests/test_new.py": "B = 1\n"},
    )
    fork.add_patch("only a test", {"tests/test_new.py": "B = 2\n"})
    return fork


def build(fork: Fork, *args: str, out: str = "dist") -> Path:
    folder = fork.root / out
    assert fork.run("build", "--out", folder, *args) == 0
    (wheel,) = folder.iterdir()
    return wheel


def pip(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--isolated", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


@pytest.mark.parametrize(
    ("variant", "project", "torch"),
    [("cuda", "fakeng", "torch==2.11.0"), ("cpu", "fakeng_cpu", "torch==2.11.0+cpu")],
)
def test_name_and_metadata(patched: Fork, variant: str, project: str, torch: str) -> None:
    wheel = build(patched, "--variant", variant)
    assert wheel.name == f"{project}-{FORK_VERSION}-py3-none-any.whl"
    head, _, body = metadata(wheel).partition("\n\n")
    lines = head.split("\n")
    assert f"Name: {project.replace('_', '-')}" in lines
    assert f"Version: {FORK_VERSION}" in lines
    assert "Summary: Version: a summary which is not a header" in lines
    assert f'Requires-Dist: {torch}; platform_machine != "s390x"' in lines
    # A required dependency, so it stands before the optional ones.
    assert lines.index("Requires-Dist: kvcached-core>=0.1") < lines.index("Provides-Extra: bench")
    assert body == "Version: 1.2.0\nRequires-Dist: not-a-header==1\n"


def test_relaxed_torch_is_the_plain_release(patched: Fork) -> None:
    text = metadata(build(patched, "--variant", "cpu", "--relax-torch"))
    assert 'Requires-Dist: torch==2.11.0; platform_machine != "s390x"\n' in text
    assert "Requires-Dist: torchvision\n" in text


def test_content_is_the_release_plus_the_patches(patched: Fork) -> None:
    wheel = build(patched, "--variant", "cpu")
    with zipfile.ZipFile(wheel) as new, zipfile.ZipFile(patched.wheel("cpu")) as old:
        assert new.testzip() is None
        files = {name: new.read(name) for name in new.namelist()}
        assert files["fakeng/core.py"] == edited(5).encode()
        assert files["fakeng/elastic.py"] == b"A = 2\n"
        assert "fakeng/old.py" not in files
        assert not [name for name in files if name.startswith("tests/")]
        for name in ("fakeng/native.so", "fakeng/dos.py", "fakeng/__init__.py"):
            assert files[name] == old.read(name)
        assert files[f"fakeng_cpu-{FORK_VERSION}.data/scripts/fakeng-tool"].startswith(b"#!python")
        # Nothing under the old names is left.
        assert not [name for name in files if name.startswith("fakeng_cpu-1.2.0.")]
        modes = {info.filename: info.external_attr >> 16 & 0o777 for info in new.infolist()}
        assert modes["fakeng/native.so"] == 0o755
        assert modes["fakeng/elastic.py"] == 0o644


def test_record_is_right(patched: Fork) -> None:
    with zipfile.ZipFile(build(patched, "--variant", "cpu")) as wheel:
        record = f"fakeng_cpu-{FORK_VERSION}.dist-info/RECORD"
        assert wheel.namelist()[-1] == record
        rows = list(csv.reader(wheel.read(record).decode().splitlines()))
        assert [row[0] for row in rows] == wheel.namelist()
        assert rows[-1] == [record, "", ""]
        for name, digest, size in rows[:-1]:
            data = wheel.read(name)
            algorithm, _, value = digest.partition("=")
            assert algorithm == "sha256"
            padded = value + "=" * (-len(value) % 4)
            assert base64.urlsafe_b64decode(padded) == hashlib.sha256(data).digest(), name
            assert int(size) == len(data)


def test_installs_and_reports_its_version(patched: Fork, tmp_path: Path) -> None:
    """pip takes the wheel, finds its requirement missing, then finds the environment sound."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name, version in (("kvcached-core", "0.1.0"), ("torch", "2.11.0"), ("torchvision", "1")):
        _empty_wheel(shelf, name, version)
    _empty_wheel(shelf, "six", "1.17")
    wheel = build(patched, "--variant", "cpu", "--relax-torch")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"

    done = pip("--python", python, "install", "--no-index", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    found = pip("--python", python, "check")
    assert found.returncode == 1
    assert "requires kvcached-core, which is not installed" in found.stdout

    done = pip("--python", python, "install", "--no-index", "--find-links", shelf, wheel)
    assert done.returncode == 0, done.stderr
    found = pip("--python", python, "check")
    assert found.returncode == 0, found.stdout

    code = (
        "import fakeng, fakeng.elastic, importlib.metadata as m;"
        "print(fakeng.__version__, m.version('fakeng-cpu'), fakeng._version.version_tuple)"
    )
    shown = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == f"{FORK_VERSION} {FORK_VERSION} (1, 2, 0, 'kvcached.7')"


def test_installs_into_a_folder_of_its_own(patched: Fork, tmp_path: Path) -> None:
    """How stock and patched engines share one environment: a folder each, chosen by path."""
    wheel = build(patched, "--variant", "cuda")
    target = tmp_path / "engine"
    done = pip("install", "--no-index", "--no-deps", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    assert (target / "fakeng" / "native.so").read_bytes() == BINARY
    assert (target / f"fakeng-{FORK_VERSION}.dist-info" / "METADATA").is_file()


def test_same_bytes_every_time(patched: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(patched, "--variant", "cpu").read_bytes()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert build(patched, "--variant", "cpu", out="again").read_bytes() == first


def test_empty_series_changes_names_only(fork: Fork) -> None:
    wheel = build(fork, "--variant", "cuda")
    with zipfile.ZipFile(wheel) as new, zipfile.ZipFile(fork.wheel("cuda")) as old:
        for name in old.namelist():
            if name.startswith("fakeng/") and name != "fakeng/_version.py":
                assert new.read(name) == old.read(name)


def test_wheel_says_what_it_was_made_of(patched: Fork) -> None:
    released = patched.wheel("cpu")
    with zipfile.ZipFile(build(patched, "--variant", "cpu")) as wheel:
        info = f"fakeng_cpu-{FORK_VERSION}.dist-info"
        facts = json.loads(wheel.read(f"{info}/kvcached_fork.json"))
        stored = {name: wheel.read(f"{info}/kvcached_patches/{name}") for name in patched.series()}
    assert stored == patched.series()
    assert facts["released_wheel"] == {
        "file": released.name,
        "sha256": hashlib.sha256(released.read_bytes()).hexdigest(),
    }
    assert [patch["sha256"] for patch in facts["patches"]] == [
        hashlib.sha256(data).hexdigest() for name, data in stored.items() if name != "series"
    ]
    assert (facts["engine"], facts["version"], facts["revision"]) == ("fakeng", "1.2.0", 7)


def test_enclosing_repository_does_not_matter(
    patched: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a repository `git apply` would skip files outside the current folder, silently."""
    subprocess.run(["git", "init", "--quiet"], cwd=patched.root, check=True)
    monkeypatch.setattr("tempfile.tempdir", str(patched.root))
    with zipfile.ZipFile(build(patched, "--variant", "cpu")) as wheel:
        assert wheel.read("fakeng/core.py") == edited(5).encode()


def test_from_source_runs_the_engine_s_own_build(patched: Fork) -> None:
    wheel = build(patched, "--variant", "cuda", "--from-source")
    assert wheel.name == f"fakeng-{FORK_VERSION}-py3-none-any.whl"
    assert "Requires-Dist: kvcached-core>=0.1\n" in metadata(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("fakeng/core.py") == edited(5).encode()
        assert archive.read("fakeng/native.so") == BINARY
        assert f"{FORK_VERSION}".encode() in archive.read("fakeng/_version.py")


def test_from_source_failure_is_reported(fork: Fork, capfd: pytest.CaptureFixture[str]) -> None:
    fork.add_patch("break the build", {"backend.py": "raise RuntimeError('broken build')\n"})
    assert fork.run("build", "--from-source", "--out", fork.root / "dist") == 1
    error = capfd.readouterr().err
    assert "the engine's own build failed" in error
    assert not (fork.root / "dist").exists()


@pytest.mark.parametrize("options", [("--variant", "cpu"), ("--relax-torch",)])
def test_from_source_is_for_the_cuda_variant(
    fork: Fork, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fork.run("build", "--from-source", *options) == 1
    assert "Leave --from-source out" in capsys.readouterr().err


def test_wheel_without_its_version_file_s_version(
    fork: Fork, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = make_wheel("cpu", {"fakeng/_version.py": b"__version__ = '9.9'\n"})
    fork.wheel("cpu").write_bytes(strange)
    write_pin(fork)
    assert fork.run("build", "--variant", "cpu", "--out", fork.root / "dist") == 1
    assert "does not state the version 1.2.0 once" in capsys.readouterr().err


def test_engine_without_a_source_build(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    path = fork.root / "engine_forks" / "pins" / f"{PIN}.toml"
    text = path.read_text()
    path.write_text(text[: text.index("[source_build]")] + text[text.index("[tests]") :])
    assert fork.run("build", "--from-source", "--out", fork.root / "dist") == 1
    assert "has no [source_build]" in capsys.readouterr().err


def test_version_file_states_the_fork_s_version(fork: Fork) -> None:
    text = "__version__ = '1.2.0'\n__version_tuple__ = (1, 2, 0)\n"
    pin = load_pin(PIN, fork.root)
    edited_text = edit_version_file(pin, pin.fork_version("cuda"), text.encode()).decode()
    assert edited_text == (
        "__version__ = '1.2.0+kvcached.7'\n__version_tuple__ = (1, 2, 0, 'kvcached.7')\n"
    )


@pytest.mark.parametrize("text", ["Name: x\n\nbody", "Version: 1\nVersion: 2\n\nbody"])
def test_metadata_must_have_one_version(text: str) -> None:
    with pytest.raises(ForkError, match="does not have one Version"):
        edit_metadata(text, Rewrite("1+kvcached.1"))


@pytest.mark.parametrize("name", ["x-1.tar.gz", "x.whl", "x-1-py3.whl"])
def test_odd_file_names_are_refused(name: str) -> None:
    with pytest.raises(ForkError, match="not a wheel's file name"):
        wheel_identity(Path(name))


def test_build_tags_are_kept() -> None:
    identity = wheel_identity(Path("x_y-1.0-2-cp38-abi3-linux_x86_64.whl"))
    assert identity == ("x_y", "1.0", "2-cp38-abi3-linux_x86_64")


def test_requirements_leave_torch_to_the_pin(
    fork: Fork, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fork.run("requirements", "--variant", "cpu") == 0
    plain = capsys.readouterr().out.splitlines()
    assert plain == ["torch==2.11.0", 'six>=1.16.0; python_version > "3.11"']
    assert fork.run("requirements", "--variant", "cpu", "--tests") == 0
    assert capsys.readouterr().out.splitlines() == [*plain, "pytest>=8"]


def test_signature_of_the_release_is_dropped(fork: Fork) -> None:
    """It signs the released RECORD, and would not verify."""
    name = f"{wheel_name('cpu').partition('-')[0]}-1.2.0.dist-info/RECORD.jws"
    fork.wheel("cpu").write_bytes(make_wheel("cpu", {name: b"signed"}))
    write_pin(fork)
    with zipfile.ZipFile(build(fork, "--variant", "cpu")) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".jws")]


def _empty_wheel(folder: Path, name: str, version: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        info = f"{stem}.dist-info"
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
