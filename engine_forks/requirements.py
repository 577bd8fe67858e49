# SPDX-License-Identifier: Apache-2.0
"""requirements: what an engine's wheel needs besides torch.

An environment that holds the stock and the patched engine in turn installs torch and these once,
then either wheel without its dependencies.
"""

from __future__ import annotations

import zipfile
from email.parser import HeaderParser
from pathlib import Path

from engine_forks.dependencies import is_extra, project_of, replaced
from engine_forks.errors import ForkError
from engine_forks.pin import Pin
from engine_forks.wheel import wheel_identity

# Chosen by the pin: a CPU wheel may ask for builds of these that the package index lacks.
_TORCH = {"torch", "torchaudio", "torchvision"}


def requirements(pin: Pin, variant: str, released: Path) -> list[str]:
    """The pinned torch, the wheel's dependencies less torch's family, then the variant's own."""
    project, version, _ = wheel_identity(released)
    with zipfile.ZipFile(released) as wheel:
        try:
            metadata = wheel.read(f"{project}-{version}.dist-info/METADATA").decode("utf-8")
        except KeyError as error:
            raise ForkError(f"{released.name}: {error}") from error
    wanted = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    own = pin.variant(variant)
    gone = replaced(wanted, own.drops, own.requires)
    kept = [line for line in wanted if not is_extra(line) and line not in gone]
    return [
        f"torch=={pin.torch}",
        *(line for line in kept if project_of(line) not in _TORCH),
        *own.requires,
    ]
