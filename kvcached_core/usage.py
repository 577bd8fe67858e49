# SPDX-License-Identifier: Apache-2.0
"""How full a GPU is, without a CUDA context: NVML's totals."""

from __future__ import annotations

import pynvml

from ._core import Ledger


class DeviceUsage:
    """Bytes on one GPU, in use by anybody and in all, as CUDA counts them.

    NVML counts more: what driver and firmware keep for themselves (480 MiB of an H100, 615 of an
    H200) is in use there from the start, and in CUDA's figures it does not exist.

    Args:
        key: the ledger key of the GPU, ``gpu-<NVML uuid>``.

    Raises:
        pynvml.NVMLError: no driver, no such GPU, or one that has no memory of its own to tell of.
    """

    def __init__(self, key: str) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(key.removeprefix("gpu-"))
        self._memory()

    def total_bytes(self) -> int:
        """All there is for anybody, the capacity of a ledger."""
        memory = self._memory()
        return int(memory.total - memory.reserved)

    def used_bytes(self) -> int:
        """Bytes in use now."""
        # Not `used`: whether that has the reserved bytes in it depends on the driver.
        memory = self._memory()
        return int(memory.total - memory.reserved - memory.free)

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

    def _memory(self) -> pynvml.c_nvmlMemory_v2_t:
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2)
