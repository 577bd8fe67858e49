# SPDX-License-Identifier: Apache-2.0
"""A process whose kernel writes where nothing is mapped, the worst that a client of MPS can do."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

FAR = 1 << 46
"""Beyond every address that a process has on the device."""


@triton.jit
def _poke(pointer, offset):
    tl.store(pointer + offset, 1)


def main() -> int:
    memory = torch.zeros(1 << 20, dtype=torch.int8, device="cuda")
    _poke[(1,)](memory, 0)
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        _poke[(1,)](memory, FAR)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        return 1
    print("no error", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
