# SPDX-License-Identifier: Apache-2.0
"""Holds memory of the first visible GPU until it is ended: a larger one has a smaller one's size.

    python benchmarks/gpu/hold_memory.py 62212  # of an H200, which leaves what an H100 has

It says so once it has them.
"""

from __future__ import annotations

import argparse
import signal

import torch

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("mib", type=int, help="in use by then, the context of this process included")
args = parser.parse_args()
torch.empty(0, device="cuda")
free, total = torch.cuda.mem_get_info()
held = torch.empty((args.mib << 20) - (total - free), dtype=torch.uint8, device="cuda")
free, total = torch.cuda.mem_get_info()
print(f"{(total - free) >> 20} MiB in use", flush=True)
signal.pause()
