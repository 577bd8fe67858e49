# SPDX-License-Identifier: Apache-2.0
"""Files with weights, which last as long as somebody uses them."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.sleep.host_file import HostFile, sweep

_KILLED = """
import os, sys
from pathlib import Path
from kvcached_core.sleep.host_file import HostFile
file = HostFile.create(Path(sys.argv[1]), 4096)
if sys.argv[2] == "published":
    file.publish("key")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["draft", "published"])
def test_what_the_killed_leave_is_swept(tmp_path: Path, state: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path), state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "it is in use"
    process.kill()
    process.communicate()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_size_is_not_taken(tmp_path: Path) -> None:
    file = HostFile.create(tmp_path, 8192)
    file.publish("key")
    assert HostFile.open(tmp_path, "key", 4096) is None
    assert HostFile.open(tmp_path, "other", 8192) is None
    again = HostFile.open(tmp_path, "key", 8192)
    assert again is not None
    file.close()
    assert again.path.exists(), "still in use"
    again.close()
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_swept_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, turns = tempfile.mkstemp, iter(range(3))

    def swept(**where: Any) -> tuple[int, str]:
        made = make(**where)
        if next(turns) < 2:
            sweep(tmp_path)  # by another engine, at this very moment
        return made

    monkeypatch.setattr(tempfile, "mkstemp", swept)
    file = HostFile.create(tmp_path, 4096)
    assert file.path.exists()
    file.publish("key")
    again = HostFile.open(tmp_path, "key", 4096)
    assert again is not None
    for each in (again, file):
        each.close()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_mapped_is_closed(tmp_path: Path) -> None:
    (tmp_path / "key.weights").touch()
    gc.collect()  # what earlier tests left open is not closed meanwhile
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="empty"):
        HostFile.open(tmp_path, "key", 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
