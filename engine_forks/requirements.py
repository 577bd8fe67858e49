# SPDX-License-Identifier: Apache-2.0
"""requirements: what an engine's wheel needs besides torch.

An environment that holds the stock and the patched engine in turn installs torch and these once,
then either wheel without its dependencies.
"""

from __future__ import annotations

import re
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from engine_forks.errors import ForkError
from engine_forks.pin import Pin
from engine_forks.wheel import wheel_identity

# Chosen by the pin: a CPU wheel may ask for builds of these that the package index lacks.
_TORCH = {"torch", "torchaudio", "torchvision"}


def requirements(pin: Pin, released: Path) -> list[str]:
    """The pinned torch, then the wheel's required dependencies less torch's family."""
    project, version, _ = wheel_identity(released)
    with zipfile.ZipFile(released) as wheel:
        try:
            metadata = wheel.read(f"{project}-{version}.dist-info/METADATA").decode("utf-8")
        except KeyError as error:
            raise ForkError(f"{released.name}: {error}") from error
    wanted = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [
        f"torch=={pin.torch}",
        *(line for line in wanted if not _is_extra(line) and _project(line) not in _TORCH),
    ]


def _is_extra(requirement: str) -> bool:
    return re.search(r"\bextra\s*==", requirement.partition(";")[2]) is not None


def _project(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower()
