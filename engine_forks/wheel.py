# SPDX-License-Identifier: Apache-2.0
"""Rewrites a wheel: version, requirements and some files, everything else as released."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from engine_forks.dependencies import replaced
from engine_forks.errors import ForkError

# The oldest date a zip can hold: the same input gives the same bytes on any day.
_DATE = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 20
_REQUIRES = "Requires-Dist: "


@dataclass(frozen=True)
class Change:
    """What becomes of one file: its new content, or None when it is gone."""

    content: bytes | None
    executable: bool = False


@dataclass(frozen=True)
class Rewrite:
    """The differences between a released wheel and the one made from it."""

    version: str
    # Added; each replaces what the release requires of the same project.
    requires: tuple[str, ...] = ()
    drops: frozenset[str] = frozenset()
    relax_torch: bool = False
    files: Mapping[str, Change] = field(default_factory=dict)
    # Files added beside METADATA, by name.
    info_files: Mapping[str, bytes] = field(default_factory=dict)


def wheel_identity(path: Path) -> tuple[str, str, str]:
    """(project, version, build and tags) as the file name states them."""
    project, _, rest = path.name.removesuffix(".whl").partition("-")
    version, _, tags = rest.partition("-")
    if path.suffix != ".whl" or tags.count("-") not in (2, 3):
        raise ForkError(f"{path.name} is not a wheel's file name")
    return project, version, tags


def rewrite_wheel(released: Path, out: Path, change: Rewrite) -> Path:
    """Writes the changed wheel into the folder `out` and returns its path."""
    project, version, tags = wheel_identity(released)
    old, new = f"{project}-{version}", f"{project}-{change.version}"
    target = out / f"{new}-{tags}.whl"
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(released) as source:
        metadata_name = f"{old}.dist-info/METADATA"
        if metadata_name not in source.namelist():
            raise ForkError(f"{released.name} has no {metadata_name}")
        files: dict[str, Change | zipfile.ZipInfo] = {
            info.filename: info for info in source.infolist() if not info.is_dir()
        }
        for name in (f"{old}.dist-info/RECORD", *_signatures(old)):
            files.pop(name, None)
        files.update(change.files)
        metadata = source.read(metadata_name).decode("utf-8")
        files[metadata_name] = Change(edit_metadata(metadata, change).encode("utf-8"))
        files.update(
            {f"{old}.dist-info/{n}": Change(content) for n, content in change.info_files.items()}
        )
        renamed = {_rename(name, old, new): file for name, file in files.items()}
        handle, scratch = tempfile.mkstemp(dir=out, prefix=f".{target.name}.")
        partial = Path(scratch)
        try:
            with os.fdopen(handle, "w+b") as file:
                _write(source, renamed, f"{new}.dist-info", file)
            partial.chmod(0o644)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def edit_metadata(text: str, change: Rewrite) -> str:
    """Sets the version and the requirements; the other headers and the text stay as released."""
    head, gap, body = text.partition("\n\n")
    lines = head.split("\n")
    if sum(line.startswith("Version: ") for line in lines) != 1:
        raise ForkError("the wheel's METADATA does not have one Version")
    lines = [f"Version: {change.version}" if x.startswith("Version: ") else x for x in lines]
    released = [x.removeprefix(_REQUIRES) for x in lines if x.startswith(_REQUIRES)]
    gone = {_REQUIRES + line for line in replaced(released, change.drops, change.requires)}
    lines = [line for line in lines if line not in gone]
    if change.relax_torch:
        lines = [_relax_torch(line) for line in lines]
    # Before the first optional requirement, where a reader expects the required ones.
    place = next((i for i, x in enumerate(lines) if x.startswith("Provides-Extra:")), len(lines))
    lines[place:place] = [_REQUIRES + requirement for requirement in change.requires]
    return "\n".join(lines) + gap + body


def _relax_torch(line: str) -> str:
    """Drops the local label of torch's pin: PyPI has torch 2.x, not torch 2.x+cpu."""
    if not line.startswith(f"{_REQUIRES}torch=="):
        return line
    pin, semicolon, marker = line.partition(";")
    return pin.split("+", 1)[0] + semicolon + marker


def _rename(name: str, old: str, new: str) -> str:
    for suffix in (".dist-info/", ".data/"):
        if name.startswith(old + suffix):
            return new + name[len(old) :]
    return name


def _signatures(old: str) -> tuple[str, str]:
    return f"{old}.dist-info/RECORD.jws", f"{old}.dist-info/RECORD.p7s"


def _write(
    source: zipfile.ZipFile,
    files: Mapping[str, Change | zipfile.ZipInfo],
    info: str,
    file: IO[bytes],
) -> None:
    rows: list[tuple[str, str, str]] = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        # dist-info last: the format asks for it, so that metadata can be found from the end.
        for name in sorted(files, key=lambda n: (n.startswith(f"{info}/"), n)):
            entry = files[name]
            if isinstance(entry, zipfile.ZipInfo):
                mode = entry.external_attr >> 16
                executable = bool(mode & stat.S_IXUSR)
                with source.open(entry) as content:
                    rows.append(_add(target, name, content, entry.file_size, executable))
            elif entry.content is not None:
                stream = io.BytesIO(entry.content)
                rows.append(_add(target, name, stream, len(entry.content), entry.executable))
        record = io.StringIO()
        csv.writer(record, lineterminator="\n").writerows([*rows, (f"{info}/RECORD", "", "")])
        data = record.getvalue().encode("utf-8")
        _add(target, f"{info}/RECORD", io.BytesIO(data), len(data), False)


def _add(
    target: zipfile.ZipFile, name: str, content: IO[bytes], size: int, executable: bool
) -> tuple[str, str, str]:
    """Adds one file and returns its row of RECORD."""
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, wherever this runs: only then are the mode bits read
    entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
    entry.file_size = size
    hashing = _Hashing(content)
    with target.open(entry, "w") as out:
        shutil.copyfileobj(hashing, out, _CHUNK)
    digest = base64.urlsafe_b64encode(hashing.digest.digest()).rstrip(b"=").decode("ascii")
    return name, f"sha256={digest}", str(size)


class _Hashing:
    """Hashes what is read through it, so that large files are read once."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self._content.read(size)
        self.digest.update(chunk)
        return chunk
