# SPDX-License-Identifier: Apache-2.0
"""A GPU as NVML tells of it, where there is none."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest


class Card:
    """One GPU, with both versions of the answer as the manual has them.

    Args:
        total: its bytes, those included that the driver keeps.
        reserved: those.
        with_reserved: whether what is in use has the reserved bytes in it in version 2; the manuals
            of different drivers do not agree.
    """

    def __init__(self, total: int, reserved: int, with_reserved: bool = False) -> None:
        self.allocated = 0
        self.tells = True
        self._total, self._reserved = total, reserved
        self._with_reserved = with_reserved

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the only GPU there is; of processes it knows nothing."""
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self._memory)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: [])

    def _memory(self, handle: object, version: int | None = None) -> Any:
        if not self.tells:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        info = pynvml.c_nvmlMemory_t() if version is None else pynvml.c_nvmlMemory_v2_t()
        info.total = self._total
        info.free = self._total - self._reserved - self.allocated
        info.used = self.allocated
        if version is None or self._with_reserved:
            info.used += self._reserved
        if version is not None:
            info.reserved = self._reserved
        return info
