# SPDX-License-Identifier: Apache-2.0
"""apply: a git work tree of the pinned release with one commit per patch."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from engine_forks import git
from engine_forks.errors import ForkError
from engine_forks.pin import Pin
from engine_forks.series import read_series

# --keep-non-patch: a subject's own [brackets] belong to it. --keep-cr: so do line ends.
_AM = ("am", "--quiet", "--keep-non-patch", "--keep-cr", "--no-gpg-sign")


def apply(pin: Pin, archive: Path, tree: Path, *, force: bool = False) -> list[str]:
    """Makes `tree` from `archive` and applies the series; returns the commits, base first."""
    if tree.exists():
        if not force:
            raise ForkError(
                f"{tree} exists and may hold work: export or move it, or use --force to replace it"
            )
        shutil.rmtree(tree)
    commits = [make_base(pin, archive, tree)]
    for patch in read_series(pin.patches):
        try:
            am(tree, patch)
        except git.GitError as error:
            git.git(tree, "am", "--abort")
            raise ForkError(
                f"{patch.name} does not apply to {pin.name} exactly as written; {tree} has the"
                f" patches before it.\n{error.output}"
            ) from error
        commits.append(git.git(tree, "rev-parse", "HEAD").strip())
    return commits


def am(tree: Path, *patches: Path, three_way: bool = False) -> None:
    """Applies mailed patches. Without `three_way` the context must match to the letter."""
    mode = ("--3way",) if three_way else ("--no-3way",)
    git.git(tree, *_AM, *mode, *(str(patch.resolve()) for patch in patches))


def make_base(pin: Pin, archive: Path, tree: Path) -> str:
    """Unpacks the pristine release into a new repository with one commit, tagged `base`."""
    unpack(archive, tree, pin.package)
    git.init(tree)
    base = git.commit_all(tree, f"{pin.engine} {pin.version} as released")
    git.git(tree, "tag", git.BASE_TAG)
    return base


def unpack(archive: Path, tree: Path, package: str) -> None:
    """Unpacks the source of a release: an archive, or a wheel's package. `tree` must not exist."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".unpack-") as scratch:
        unpacked = Path(scratch) / "tree"
        unpacked.mkdir()
        if archive.suffix == ".whl":
            _unpack_wheel(archive, unpacked, package)
            unpacked.rename(tree)
        else:
            _unpack_archive(archive, unpacked).rename(tree)


def _unpack_archive(archive: Path, folder: Path) -> Path:
    """Returns the archive's top folder."""
    with tarfile.open(archive) as tar:
        # Unknown to Python 3.11.3 and older; what is unpacked has the pinned hash anyway.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    tops = list(folder.iterdir())
    if len(tops) != 1 or not tops[0].is_dir():
        raise ForkError(f"{archive.name} is not a source archive with one top folder")
    return tops[0]


def _unpack_wheel(wheel: Path, folder: Path, package: str) -> None:
    """Unpacks what patches may change. What is compiled differs by machine, and no source does."""
    with zipfile.ZipFile(wheel) as content:
        for info in content.infolist():
            if info.filename.startswith(f"{package}/") and not info.filename.endswith((".so", "/")):
                path = Path(content.extract(info, folder))
                # zipfile leaves the mode to the umask.
                path.chmod(0o755 if info.external_attr >> 16 & 0o100 else 0o644)
    if not (folder / package).is_dir():
        raise ForkError(f"{wheel.name} has no {package}/")
