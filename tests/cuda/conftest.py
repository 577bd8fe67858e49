# SPDX-License-Identifier: Apache-2.0
"""Builds the stand-in drivers, once a session, with the machine's C++ compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcached_core._core import Backend, CudaBackend, HipBackend

SOURCE = Path(__file__).parent.parent / "standin_cuda" / "standin.cpp"
PAGE = 4 << 10  # the smallest there can be, to write and compare little


@dataclass(frozen=True)
class Live:
    """What exists in a driver."""

    handles: int = 0
    mappings: int = 0
    ranges: int = 0
    streams: int = 0
    contexts: int = 0
    bytes: int = 0


class StandIn:
    """One stand-in driver library: the backend's way to it, and the tests' way behind it."""

    def __init__(self, vendor: str, path: Path, backend: Callable[[int], Backend]) -> None:
        self.vendor = vendor
        self.path = path
        self.backend = backend
        self._library = ctypes.CDLL(str(path))
        self._library.standin_fail.argtypes = [
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_char_p,
        ]
        self._library.standin_calls.restype = ctypes.c_uint64
        self._library.standin_misuses.restype = ctypes.c_uint64
        self._library.standin_misuse_text.restype = ctypes.c_char_p

    def name(self, cuda: str, hip: str) -> str:
        return cuda if self.vendor == "cuda" else hip

    def fail(self, nth: int, code: int, op: str = "", times: int = 1) -> None:
        self._library.standin_fail(nth, times, code, op.encode())

    def clear(self) -> None:
        self.fail(0, 0)

    def calls(self, op: str = "") -> int:
        return int(self._library.standin_calls(op.encode()))

    def live(self) -> Live:
        counts = (ctypes.c_uint64 * 6)()
        self._library.standin_live(counts)
        return Live(*counts)

    def misuses(self) -> tuple[int, str]:
        return self._library.standin_misuses(), self._library.standin_misuse_text().decode()

    @property
    def current_device(self) -> int:
        """The device current on this thread; -1 for none."""
        return int(self._library.standin_current_device())

    @current_device.setter
    def current_device(self, device: int) -> None:
        self._library.standin_set_current_device(device)


def _build(directory: Path, name: str, *flags: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the stand-in drivers with")
    output = directory / name
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([*command, *flags, "-o", str(output), str(SOURCE)], check=True)
    return output


@pytest.fixture(scope="session", params=["cuda", "hip"])
def _standin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    directory = tmp_path_factory.mktemp("standin")
    with pytest.MonkeyPatch.context() as patch:
        # Read once, when the library is first called.
        patch.setenv("STANDIN_GRANULARITY", str(PAGE))
        patch.setenv("STANDIN_TOTAL_BYTES", str(256 * PAGE))
        if request.param == "cuda":
            standin = StandIn("cuda", _build(directory, "libcuda.so.1"), CudaBackend)
        else:
            library = _build(directory, "libamdhip64.so", "-DSTANDIN_HIP")
            standin = StandIn("hip", library, HipBackend)
        standin.clear()
    return standin


@pytest.fixture
def standin(_standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A driver in which nothing exists; the test must leave it so, without misuse."""
    variable = _standin.name("KVCACHED_LIBCUDA", "KVCACHED_LIBHIP")
    monkeypatch.setenv(variable, str(_standin.path))
    assert _standin.live() == Live()
    misuses = _standin.misuses()
    device = _standin.current_device
    yield _standin
    _standin.clear()
    assert _standin.misuses() == misuses
    assert _standin.live() == Live()
    assert _standin.current_device == device
