# SPDX-License-Identifier: Apache-2.0
"""What NVML says of a GPU, and what a ledger makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pynvml
import pytest

from kvcached_core import Ledger
from kvcached_core.devices import open_usage
from kvcached_core.plan import RankDevice
from kvcached_core.usage import DeviceUsage

GIB, MIB = 1 << 30, 1 << 20
KEY = "gpu-GPU-1"
TOTAL, RESERVED, HEADROOM = 80 * GIB, 480 * MIB, GIB


class Card:
    """One GPU behind NVML, as its manual has both versions of the answer.

    Args:
        with_reserved: whether what is in use has the reserved bytes in it in version 2; the manuals
            of different drivers do not agree.
    """

    def __init__(self, with_reserved: bool = False) -> None:
        self.allocated = 0
        self.tells = True
        self._with_reserved = with_reserved

    def memory(self, handle: object, version: int | None = None) -> Any:
        if not self.tells:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        info = pynvml.c_nvmlMemory_t() if version is None else pynvml.c_nvmlMemory_v2_t()
        info.total = TOTAL
        info.free = TOTAL - RESERVED - self.allocated
        info.used = self.allocated
        if version is None or self._with_reserved:
            info.used += RESERVED
        if version is not None:
            info.reserved = RESERVED
        return info


def put_in(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", card.memory)


@pytest.mark.parametrize("with_reserved", [False, True])
def test_the_drivers_own_memory_is_not_taken_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_reserved: bool
) -> None:
    card = Card(with_reserved)
    put_in(monkeypatch, card)
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
    card = Card()
    put_in(monkeypatch, card)
    device = RankDevice("cuda", KEY, TOTAL - RESERVED, 2 * MIB)
    assert open_usage(device) is not None
    card.tells = False
    assert open_usage(device) is None
    assert "KVCACHED_HEADROOM" in caplog.text
