# SPDX-License-Identifier: Apache-2.0
"""What the driver alone takes to move pages: the calls in a bare loop, with no allocator around.

python benchmarks/gpu/driver_cost.py --gib 10 --page-mib 16
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


def measure(num_bytes: int, page_bytes: int) -> dict[str, float]:
    """Seconds to take `num_bytes` from the driver and to give them back, page by page."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *args: object) -> None:
        if code := getattr(cuda, name)(*args):
            raise RuntimeError(f"{name} failed with {code}")

    context, device = ctypes.c_void_p(), ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    pages = num_bytes // page_bytes
    size = ctypes.c_size_t(page_bytes)
    base = ctypes.c_uint64()
    whole = ctypes.c_size_t(pages * page_bytes)
    call("cuMemAddressReserve", ctypes.byref(base), whole, ctypes.c_size_t(0), 0, 0)
    properties = _Properties(type=1, location=_Location(1, 0))
    access = _Access(_Location(1, 0), 3)
    handles = [ctypes.c_uint64() for _ in range(pages)]
    where = [ctypes.c_uint64(base.value + i * page_bytes) for i in range(pages)]

    begin = time.perf_counter()
    for handle, address in zip(handles, where, strict=True):
        call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), 0)
        call("cuMemMap", address, size, ctypes.c_size_t(0), handle, 0)
        call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
    taken = time.perf_counter()
    for handle, address in zip(handles, where, strict=True):
        call("cuMemUnmap", address, size)
        call("cuMemRelease", handle)
    given = time.perf_counter()
    call("cuMemAddressFree", base, whole)
    call("cuDevicePrimaryCtxRelease", device)
    return {"pages": pages, "take_s": taken - begin, "give_s": given - taken}


BUSY = """
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print("running", flush=True)
while True:
    for _ in range(50):
        a @ a
    torch.cuda.synchronize()
"""


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that keeps the GPU computing."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="The driver's own cost of moving pages.")
    parser.add_argument("--gib", type=float, default=10)
    parser.add_argument("--page-mib", type=int, default=16)
    parser.add_argument("--busy", action="store_true", help="beside a process that computes")
    args = parser.parse_args()
    with busy_neighbour() if args.busy else nullcontext():
        print(json.dumps(measure(int(args.gib * 2**30), args.page_mib << 20)))


if __name__ == "__main__":
    main()
