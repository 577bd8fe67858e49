# SPDX-License-Identifier: Apache-2.0
"""Pools without a server, for what no CPU engine can run: does each what the stock one does?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sglang_server import sglang_environment

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(300)

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("script", ["state_pool.py", "latent_pool.py"])
def test_a_pool_does_as_the_stock_one(script: str, tmp_path: Path) -> None:
    path = f"{sglang_environment('patched')['PYTHONPATH']}:{SUPPORT / 'cpu_kernels'}"
    env = sglang_environment("patched", {"TRITON_INTERPRET": "1", "PYTHONPATH": path})
    (tmp_path / "ledger").mkdir(mode=0o700)
    command = [sys.executable, str(SUPPORT / script), str(tmp_path / "ledger")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]
