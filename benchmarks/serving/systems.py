# SPDX-License-Identifier: Apache-2.0
"""The systems under test: what makes a server's environment and command line each of them.

A system is written `name[:setting=value]...`, with `-mps` after the name to run it under MPS:

- `static`: the unpatched engine, each with an equal part of the GPU, or with so much memory for its
  KV cache as the setting `kv_cache` says (`static:kv_cache=2GiB`).
- `elastic`: the patched engine with the feature on; settings are kvcached's, e.g. `page_size=4MiB`.
- `off`: the patched engine with the feature off.
- `kvcached`: the public kvcached over the unpatched engine; settings are its own variables.

`ENGINE_STOCK`, `ENGINE_PATCHED` and `ENGINE_KVCACHED` are the folders of the three.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvcached_core.units import parse_size
from tests.support.engines import Flavor, engine_environment

NAMES = ("static", "elastic", "off", "kvcached")
STARTS = ("one", "stagger", "all")


@dataclass(frozen=True)
class System:
    """One system, as it was written."""

    text: str
    kind: str
    mps: bool = False
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> System:
        """Reads `name[-mps][:setting=value]...`.

        Raises:
            ValueError: it is none of them.
        """
        name, *options = text.split(":")
        kind = name.removesuffix("-mps")
        if kind not in NAMES:
            raise ValueError(f"{text!r} begins with none of {', '.join(NAMES)}")
        settings = {}
        for option in options:
            key, equals, value = option.partition("=")
            known = kind in ("elastic", "kvcached") or (kind == "static" and key == "kv_cache")
            if not equals or not known:
                raise ValueError(f"{option!r} in {text!r} is not understood")
            settings[key] = value
        return cls(text, kind, name != kind, settings)

    @property
    def flavor(self) -> Flavor:
        return "patched" if self.kind in ("elastic", "off") else "stock"

    @property
    def start(self) -> str:
        """`one` server after another, `all` at once, or `stagger`: the next once one has profiled.

        Engines measure the memory they need while they start; others that start then falsify it.
        An elastic engine asks for nothing that depends on it but the memory of its graphs, and one
        that is told the size of its KV cache for nothing at all.
        """
        if "kv_cache" in self.settings:
            return "all"
        return "stagger" if self.kind == "elastic" else "one"

    def environment(self, name: str, ledger: Path, extra: Mapping[str, str]) -> dict[str, str]:
        """Of the server `name`, on top of the engine's."""
        env = dict(extra)
        if self.kind == "elastic":
            env |= {
                "ENABLE_KVCACHED": "true",
                "KVCACHED_NAME": name,
                "KVCACHED_LEDGER_DIR": str(ledger),
            }
            env |= {f"KVCACHED_{key.upper()}": value for key, value in self.settings.items()}
        elif self.kind == "kvcached":
            env |= {
                "ENABLE_KVCACHED": "true",
                "KVCACHED_AUTOPATCH": "1",
                "KVCACHED_IPC_NAME": f"bench_{name}_{os.getpid()}",
                "VLLM_USE_V2_MODEL_RUNNER": "0",
                "PYTHONPATH": _public_path(extra.get("PYTHONPATH", "")),
            }
            env |= {key.upper(): value for key, value in self.settings.items()}
        return env

    def share(self, servers: int) -> list[str]:
        """The part of the GPU each server may take, where it is told at start."""
        if "kv_cache" in self.settings:
            size = parse_size(self.settings["kv_cache"])
            # The part of the GPU is only looked at to refuse a start.
            return [f"--kv-cache-memory-bytes={size}", "--gpu-memory-utilization=0.01"]
        if self.kind in ("static", "off"):
            # Three get 0.31 each: what is left over are their CUDA contexts.
            return [f"--gpu-memory-utilization={int(9300 / servers) / 10000}"]
        return []


def _public_path(extra: str) -> str:
    folder = os.environ.get("ENGINE_KVCACHED", "")
    if not folder:
        raise ValueError("ENGINE_KVCACHED names no folder with the public kvcached")
    # The unpatched engine's own path, with the public kvcached before it.
    path = engine_environment("stock")["PYTHONPATH"]
    return os.pathsep.join(part for part in (folder, extra, path) if part)
