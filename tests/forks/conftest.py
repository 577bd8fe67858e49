# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tests.forks.fake_engine import Fork, make_fork, make_wheel_fork


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fork:
    """A fork of a tiny engine, released on an index in a local folder."""
    made = make_fork(tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", (made.index / "simple").as_uri())
    return made


@pytest.fixture
def wheel_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fork:
    """A fork of a tiny engine that is released as wheels only."""
    made = make_wheel_fork(tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", (made.index / "simple").as_uri())
    return made
