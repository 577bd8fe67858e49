# SPDX-License-Identifier: Apache-2.0
"""What NVML says of a GPU, and what a ledger makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached_core import Ledger
from kvcached_core.devices import open_usage
from kvcached_core.plan import RankDevice
from kvcached_core.usage import DeviceUsage
from tests.support.nvml_card import Card

GIB, MIB = 1 << 30, 1 << 20
KEY = "gpu-GPU-1"
TOTAL, RESERVED, HEADROOM = 80 * GIB, 480 * MIB, GIB


@pytest.mark.parametrize("with_reserved", [False, True])
def test_the_drivers_own_memory_is_not_taken_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_reserved: bool
) -> None:
    card = Card(TOTAL, RESERVED, with_reserved)
    card.put_in(monkeypatch)
    usage = DeviceUsage(KEY)
    assert usage.total_bytes() == TOTAL - RESERVED  # what CUDA has of such a card
    with_gpu = Ledger(str(tmp_path / f"{KEY}.ledger"), usage.total_bytes(), HEADROOM)
    usage.publish(with_gpu)
    assert with_gpu.external == 0
    assert with_gpu.available() == TOTAL - RESERVED - HEADROOM
    card.allocated = 60 * GIB
    usage.publish(with_gpu)
    assert with_gpu.external == 60 * GIB
    assert with_gpu.available() == TOTAL - RESERVED - HEADROOM - 60 * GIB


def test_a_gpu_that_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = Card(TOTAL, RESERVED)
    card.put_in(monkeypatch)
    device = RankDevice("cuda", KEY, TOTAL - RESERVED, 2 * MIB)
    assert open_usage(device) is not None
    card.tells = False
    assert open_usage(device) is None
    assert "KVCACHED_HEADROOM" in caplog.text
