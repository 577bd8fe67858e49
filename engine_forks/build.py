# SPDX-License-Identifier: Apache-2.0
"""build: a patched wheel, from the released wheel or by the engine's own build."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from engine_forks.apply import apply
from engine_forks.errors import ForkError
from engine_forks.fetch import sha256_of
from engine_forks.git import GitError, git
from engine_forks.pin import Pin
from engine_forks.series import ORDER_FILE, read_series, touched_paths
from engine_forks.wheel import Change, Rewrite, rewrite_wheel

FORK_FILE = "kvcached_fork.json"


def build(pin: Pin, variant: str, released: Path, out: Path, *, relax_torch: bool = False) -> Path:
    """Patches the released wheel; its compiled files are those of the release, untouched."""
    files = patched_files(pin, released)
    with zipfile.ZipFile(released) as wheel:
        current = files.get(pin.version_file)
        content = wheel.read(pin.version_file) if current is None else current.content or b""
    files[pin.version_file] = Change(edit_version_file(pin, pin.fork_version(variant), content))
    change = _rewrite(pin, variant, released)
    return rewrite_wheel(released, out, replace(change, relax_torch=relax_torch, files=files))


def build_from_source(
    pin: Pin, archive: Path, released: Path, out: Path, *, isolated: bool = True
) -> Path:
    """Runs the engine's own build of the patched source, with the release's compiled files."""
    if not pin.source_build:
        raise ForkError(f"{pin.name} has no [source_build] in its pin: build without --from-source")
    with tempfile.TemporaryDirectory(prefix="kvcached-source-") as scratch:
        tree, built = Path(scratch) / "tree", Path(scratch) / "built"
        apply(pin, archive, tree)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={built}", "."]
        if not isolated:
            command.insert(-1, "--no-build-isolation")
        done = subprocess.run(
            command, cwd=tree, env=_source_environment(pin, released), check=False
        )
        wheels = list(built.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise ForkError(f"the engine's own build failed ({done.returncode}), see above")
        return rewrite_wheel(wheels[0], out, _rewrite(pin, "cuda", released))


def patched_files(pin: Pin, released: Path) -> dict[str, Change]:
    """Applies the series to the wheel's own files; returns those that it changes."""
    prefix = f"{pin.package}/"
    with tempfile.TemporaryDirectory(prefix="kvcached-wheel-") as scratch:
        tree = Path(scratch).resolve()
        touched: set[str] = set()
        with zipfile.ZipFile(released) as wheel:
            names = set(wheel.namelist())
            for patch in read_series(pin.patches):
                # Patches may change the engine's tests too; a wheel has none.
                paths = {path for path in touched_paths(patch) if path.startswith(prefix)}
                for path in sorted(paths - touched):
                    if path in names:
                        _extract(wheel, path, tree)
                touched |= paths
                if paths:
                    _git_apply(tree, patch, prefix, released)
        return {path: _change(tree / path) for path in sorted(touched)}


def edit_version_file(pin: Pin, fork_version: str, content: bytes) -> bytes:
    """Makes the engine report the fork's version at run time too."""
    text = content.decode("utf-8")
    local = fork_version.partition("+")[2]
    release = ", ".join(part if part.isdigit() else repr(part) for part in pin.version.split("."))
    for old, new in (
        (rf"(['\"]){re.escape(pin.version)}\1", f"'{fork_version}'"),
        (rf"\({re.escape(release)}\)", f"({release}, '{local}')"),
    ):
        text, count = re.subn(old, new, text)
        if count != 1:
            raise ForkError(f"{pin.version_file} does not state the version {pin.version} once")
    return text.encode("utf-8")


def provenance(pin: Pin, variant: str, released: Path) -> dict[str, bytes]:
    """What the wheel was made of, kept beside its METADATA: the facts and the patches."""
    patches = read_series(pin.patches)
    facts = {
        "engine": pin.engine,
        "version": pin.version,
        "revision": pin.revision,
        "variant": variant,
        "released_wheel": {"file": released.name, "sha256": sha256_of(released)},
        "patches": [{"file": patch.name, "sha256": sha256_of(patch)} for patch in patches],
    }
    files = {f"kvcached_patches/{path.name}": path.read_bytes() for path in patches}
    files[f"kvcached_patches/{ORDER_FILE}"] = (pin.patches / ORDER_FILE).read_bytes()
    files[FORK_FILE] = (json.dumps(facts, indent=2) + "\n").encode("utf-8")
    return files


def _rewrite(pin: Pin, variant: str, released: Path) -> Rewrite:
    own = pin.variant(variant)
    return Rewrite(
        version=pin.fork_version(variant),
        requires=(*pin.requires, *own.requires),
        drops=own.drops,
        info_files=provenance(pin, variant, released),
    )


def _source_environment(pin: Pin, released: Path) -> dict[str, str]:
    values = {"released_wheel": str(released.resolve()), "fork_version": pin.fork_version("cuda")}
    own = {name: value.format_map(values) for name, value in pin.source_build.items()}
    return {**os.environ, **own}


def _extract(wheel: zipfile.ZipFile, name: str, tree: Path) -> None:
    target = tree / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(wheel.read(name))
    target.chmod(0o755 if wheel.getinfo(name).external_attr >> 16 & 0o100 else 0o644)


def _git_apply(tree: Path, patch: Path, prefix: str, released: Path) -> None:
    try:
        git(tree, "apply", "--whitespace=nowarn", f"--include={prefix}*", str(patch.resolve()))
    except GitError as error:
        raise ForkError(
            f"{patch.name} does not apply to {released.name} exactly as written:\n{error.output}"
        ) from error


def _change(path: Path) -> Change:
    if not path.is_file():
        return Change(None)
    return Change(path.read_bytes(), executable=bool(path.stat().st_mode & 0o100))
