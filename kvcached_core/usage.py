# SPDX-License-Identifier: Apache-2.0
"""How full a GPU is, without a CUDA context: NVML's totals."""

from __future__ import annotations

import pynvml

from ._core import Ledger


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

    def publish(self, ledger: Ledger) -> None:
        """Tell a ledger of the device how much is in use."""
        reading = ledger.reading()
        ledger.set_device_used(self.used_bytes(), reading)

    def process_bytes(self, pid: int) -> int | None:
        """Bytes of one process, or None if the driver does not know it.

        It knows processes by the machine's own ids: one in a container is mostly not found.
        """
        try:
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return None
        sizes = [process.usedGpuMemory for process in found if process.pid == pid]
        return sum(sizes) if sizes and None not in sizes else None
