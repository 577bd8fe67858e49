# SPDX-License-Identifier: Apache-2.0
"""How full a GPU is, without a CUDA context: NVML's totals."""

from __future__ import annotations

import pynvml


class DeviceUsage:
    """Bytes in use on one GPU by anybody.

    Args:
        key: the ledger key of the GPU, ``gpu-<NVML uuid>``.

    Raises:
        pynvml.NVMLError: no driver, or no such GPU.
    """

    def __init__(self, key: str) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(key.removeprefix("gpu-"))

    def used_bytes(self) -> int:
        """Bytes in use now, the driver's own among them."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
