# SPDX-License-Identifier: Apache-2.0
"""A tiny engine release on a package index of its own: source archive, two wheels, pin, series.

Or, as `make_wheel_fork` makes it, a release that is nothing but a wheel for each Python.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engine_forks.__main__ import main

VERSION = "1.2.0"
PIN = f"fakeng-{VERSION}"

CORE = "".join(f"line_{n} = {n}\n" for n in range(400))
VERSION_PY = f"__version__ = version = '{VERSION}'\n__version_tuple__ = version_tuple = (1, 2, 0)\n"
# The tags of two Pythons: one that a machine has no more, and the one that runs.
PYTHONS = ("cp39", "cp{}{}".format(*sys.version_info))
INIT = "from fakeng._version import __version__\n"
TEST = "def test_nothing() -> None:\n    assert True\n"
BINARY = bytes(range(256)) * 64

# A build backend without requirements, so that pip's isolated build works with no network. Like
# the real engine it takes compiled files from a released wheel and its version from outside.
BACKEND = """\
import os, zipfile
from pathlib import Path

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    version = os.environ["FAKENG_VERSION"]
    info = f"fakeng-{version}.dist-info"
    name = f"fakeng-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        with zipfile.ZipFile(os.environ["FAKENG_RELEASED"]) as released:
            wheel.writestr("fakeng/native.so", released.read("fakeng/native.so"))
        for path in sorted(Path("fakeng").glob("*.py")):
            wheel.writestr(path.as_posix(), path.read_bytes())
        wheel.writestr("fakeng/_version.py", f"__version__ = '{version}'\\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: fakeng\\nVersion: {version}\\n\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""  # noqa: E501
SOURCE_BUILD = {
    "FAKENG_RELEASED": "{released_wheel}",
    "FAKENG_VERSION": "{fork_version}",
}
PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

SOURCE_FILES = {
    "fakeng/__init__.py": INIT.encode(),
    "fakeng/_version.py": VERSION_PY.encode(),
    "fakeng/core.py": CORE.encode(),
    "fakeng/dos.py": b"first = 1\r\nsecond = 2\r\n",
    "fakeng/old.py": b"gone = True\n",
    "csrc/kernel.cu": b"// compiled\n",
    "tests/test_core.py": TEST.encode(),
    ".gitignore": b"/fakeng/_version.py\n*.egg-info\n",
    # Conversions that a careless `git add` would do.
    ".gitattributes": b"* text=auto eol=lf\n",
    "backend.py": BACKEND.encode(),
    "pyproject.toml": PYPROJECT.encode(),
}

METADATA = """\
Metadata-Version: 2.4
Name: {name}
Version: 1.2.0
Summary: Version: a summary which is not a header
Requires-Dist: torch==2.11.0{label}; platform_machine != "s390x"
Requires-Dist: torchvision
Requires-Dist: six>=1.16.0; python_version > "3.11"
Provides-Extra: bench
Requires-Dist: pandas; extra == "bench"

Version: 1.2.0
Requires-Dist: not-a-header==1
"""


@dataclass(frozen=True)
class Fork:
    """Where everything of one fake fork is, and short ways to run the tools on it."""

    root: Path
    cache: Path
    index: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches" / "fakeng" / VERSION

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def archive(self) -> Path:
        return self.index / "files" / f"{PIN}.tar.gz"

    def wheel(self, variant: str) -> Path:
        return self.index / "files" / wheel_name(variant)

    def run(self, verb: str, *args: str | Path) -> int:
        """Runs a verb of the command line in this process."""
        options = ("--root", self.root, "--cache", self.cache)
        return main([verb, PIN, *map(str, (*args, *options))])

    def apply(self, *args: str) -> int:
        return self.run("apply", "--tree", self.tree, *args)

    def export(self) -> int:
        return self.run("export", "--tree", self.tree)

    def series(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.patches.iterdir())}

    def commit(self, subject: str, body: str | None = None) -> None:
        """Commits all changes of the work tree, as a contributor does with a git of their own."""
        message = f"{subject}\n\n{good_trailers() if body is None else body}"
        for command in (["add", "--all"], ["commit", "--quiet", f"--message={message}"]):
            subprocess.run(["git", *command], cwd=self.tree, env=person(), check=True)

    def add_patch(self, subject: str, changes: dict[str, str | None], **options: str) -> None:
        """Makes a patch from new file contents (None removes a file), and exports the series."""
        assert self.apply("--force") == 0
        for name, content in changes.items():
            path = self.tree / name
            if content is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode())
        self.commit(subject, **options)
        assert self.export() == 0


def good_trailers(leave_out: str = "") -> str:
    trailers = {
        "Why": "the tests need a patch whose reason\n is longer than one line",
        "Upstream-Status": "not wanted",
        "Removal": "with the tests",
        "Tests": "tests/test_core.py::test_nothing",
    }
    return "\n".join(f"{key}: {text}" for key, text in trailers.items() if key != leave_out)


def edited(line: int, text: str = "changed = True") -> str:
    """The engine's core.py with one line replaced."""
    lines = CORE.splitlines(keepends=True)
    lines[line] = f"{text}\n"
    return "".join(lines)


def person() -> dict[str, str]:
    """A contributor's environment: an identity, and none of this machine's configuration."""
    who = {"NAME": "A Person", "EMAIL": "person@example.org"}
    return {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{role}_{key}": who[key] for role in ("AUTHOR", "COMMITTER") for key in who},
    }


def make_fork(root: Path) -> Fork:
    fork = _empty_fork(root)
    fork.archive.write_bytes(make_archive())
    for variant in ("cuda", "cpu"):
        fork.wheel(variant).write_bytes(make_wheel(variant))
    _list_files(fork, "fakeng", "fakeng-cpu")
    write_pin(fork)
    return fork


def make_wheel_fork(root: Path) -> Fork:
    """A fork of a release without a source archive, and with one wheel for both variants."""
    fork = _empty_fork(root)
    for python in PYTHONS:
        compiled = {"fakeng/native.so": python.encode() + BINARY}
        python_wheel(fork, python).write_bytes(make_wheel("cuda", compiled))
    _list_files(fork, "fakeng")
    write_wheel_pin(fork)
    return fork


def _empty_fork(root: Path) -> Fork:
    fork = Fork(root / "repo", root / "cache", root / "index")
    (fork.index / "files").mkdir(parents=True)
    fork.patches.mkdir(parents=True)
    (fork.patches / "series").touch()
    return fork


def _list_files(fork: Fork, *projects: str) -> None:
    for project in projects:
        page = fork.index / "simple" / project / "index.html"
        page.parent.mkdir(parents=True)
        links = [
            f'<a href="../../files/{path.name}#sha256=0">{path.name}</a><br/>'
            for path in sorted((fork.index / "files").iterdir())
        ]
        page.write_text("<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>")


def write_pin(fork: Fork) -> None:
    wheels = "".join(
        f"[wheels.{variant}.{platform.machine()}]\n{_artifact(project, fork.wheel(variant))}"
        for variant, project in (("cuda", "fakeng"), ("cpu", "fakeng-cpu"))
    )
    own_build = "".join(f"{name} = '{value}'\n" for name, value in SOURCE_BUILD.items())
    _write_pin(fork, fork.archive, f"{wheels}[source_build]\n{own_build}")


def write_wheel_pin(fork: Fork, source: str = PYTHONS[0], cpu: str | None = None) -> None:
    """Pins both Pythons' wheels; `source` says whose is the source, `cpu` what the variant has."""
    wheels = "".join(
        f"[wheels.cuda.{platform.machine()}.{python}]\n"
        f"{_artifact('fakeng', python_wheel(fork, python))}"
        for python in PYTHONS
    )
    own = 'drops = ["TorchVision"]\nrequires = ["six==1.17", "attrs"]\n' if cpu is None else cpu
    own = f'[variants.cpu]\nwheels = "cuda"\nlabel = "cpu"\n{own}'
    _write_pin(fork, python_wheel(fork, source), wheels + own)


def _write_pin(fork: Fork, source: Path, rest: str) -> None:
    pins = fork.root / "engine_forks" / "pins"
    pins.mkdir(parents=True, exist_ok=True)
    (pins / f"{PIN}.toml").write_text(
        f'engine = "fakeng"\nversion = "{VERSION}"\nrevision = 7\npackage = "fakeng"\n'
        'version_file = "fakeng/_version.py"\npython = ">=3.10"\ntorch = "2.11.0"\n'
        'requires = ["kvcached-core>=0.1"]\n'
        f"[source]\n{_artifact('fakeng', source)}{rest}"
        '[tests]\nrequires = ["pytest>=8"]\n'
    )


def make_archive(changes: dict[str, bytes | None] | None = None, version: str = VERSION) -> bytes:
    files = {**SOURCE_FILES, **(changes or {})}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            if content is not None:
                member = tarfile.TarInfo(f"fakeng-{version}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def wheel_name(variant: str) -> str:
    project = {"cuda": "fakeng", "cpu": "fakeng_cpu"}[variant]
    return f"{project}-{VERSION}-py3-none-any.whl"


def python_wheel(fork: Fork, python: str) -> Path:
    return fork.index / "files" / f"fakeng-{VERSION}-{python}-none-any.whl"


def make_wheel(variant: str, changes: dict[str, bytes] | None = None) -> bytes:
    project = wheel_name(variant).partition("-")[0]
    info = f"{project}-{VERSION}.dist-info"
    label = "+cpu" if variant == "cpu" else ""
    metadata = METADATA.format(name=project.replace("_", "-"), label=label)
    files = {name: data for name, data in SOURCE_FILES.items() if name.startswith("fakeng/")}
    files |= {"fakeng/native.so": BINARY, f"{info}/METADATA": metadata.encode()}
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{project}-{VERSION}.data/scripts/fakeng-tool"] = b"#!python\nprint('tool')\n"
    files |= changes or {}
    record = "".join(f"{name},{_record_hash(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (2026, 6, 30, 1, 2, 4))
            entry.create_system = 3
            entry.external_attr = (0o100755 if name.endswith((".so", ".sh")) else 0o100644) << 16
            wheel.writestr(entry, data)
    return buffer.getvalue()


def _record_hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"sha256={digest}"


def _artifact(project: str, path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f'project = "{project}"\nfile = "{path.name}"\nsha256 = "{digest}"\n'
