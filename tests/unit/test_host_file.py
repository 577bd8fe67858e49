# SPDX-License-Identifier: Apache-2.0
"""Files with weights, which last as long as somebody uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
