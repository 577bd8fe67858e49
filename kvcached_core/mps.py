# SPDX-License-Identifier: Apache-2.0
"""NVIDIA MPS for the engines of one user: without it, processes take turns on the GPU.

One control daemon per user, with pipes and logs in a directory of its own. A daemon that somebody
else started has other pipes and is never spoken to, and no setting of the GPU is changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

from .config import Config, ConfigError

CONTROL = "nvidia-cuda-mps-control"
SERVER = "nvidia-cuda-mps-server"
DIRECTORY = "KVCACHED_MPS_DIR"
_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_LOGS = "CUDA_MPS_LOG_DIRECTORY"
_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_MEMORY = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
_CLIENTS = ("CUDA_MPS_", "CUDA_VISIBLE_DEVICES")
# Where drivers that were not installed by the distribution keep their programs.
_MORE_PLACES = ("/usr/bin", "/usr/local/nvidia/bin", "/usr/local/bin")
# A unix socket's name has 107 characters; the longest in the pipe directory takes about 20.
_LONGEST = 80
_ANSWER_S = 10.0
_RACE_S = 1.0


class MpsError(RuntimeError):
    """MPS cannot do what was asked; the message names the remedy."""


def default_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Where this user's pipes and logs are."""
    environ = os.environ if environ is None else environ
    if environ.get(DIRECTORY):
        return Path(environ[DIRECTORY])
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "kvcached" / "mps"
    return Path(tempfile.gettempdir()) / f"kvcached-{os.getuid()}" / "mps"


def client_environment(
    config: Config, directory: Path | None = None, devices: Iterable[int] = (0,)
) -> dict[str, str]:
    """What a process needs in its environment, before it starts, to be a client of our daemon.

    Args:
        config: the engine's settings, of which the share of the SMs and the ceiling apply.
        directory: the daemon's; None for this user's.
        devices: the ordinals of the GPUs that the process will see; the ceiling is for each.
    """
    directory = default_directory() if directory is None else directory
    env = {_PIPES: str(directory / "pipe"), _LOGS: str(directory / "log")}
    if config.sm_share is not None:
        env[_SHARE] = str(config.sm_share)
    if config.mps_memory is not None:
        limit = f"{config.mps_memory >> 20}M"
        env[_MEMORY] = ",".join(f"{ordinal}={limit}" for ordinal in devices)
    return env


def require_launched_with(config: Config, environ: Mapping[str, str] | None = None) -> None:
    """Refuse settings that only the environment of a client can bring about, where it lacks them.

    Raises:
        ConfigError: the settings would be ignored.
    """
    environ = os.environ if environ is None else environ
    wanted = {_SHARE: config.sm_share, _MEMORY: config.mps_memory}
    lacking = [name for name, value in wanted.items() if value is not None and name not in environ]
    if lacking:
        raise ConfigError(
            f"kvcached settings sm_share and mps_memory act through MPS, and {', '.join(lacking)} "
            "is not in this process's environment: start MPS with `kvctl mps start` and the engine "
            'after `eval "$(kvctl mps env)"`, or unset KVCACHED_SM_SHARE and KVCACHED_MPS_MEMORY'
        )


@dataclass(frozen=True, slots=True)
class Server:
    """An MPS server and the processes that are its clients; one for each user and GPU set."""

    pid: int
    state: str
    clients: dict[int, str] = field(default_factory=dict)
    """Process ids and what they run."""


@dataclass(frozen=True, slots=True)
class Status:
    """What our daemon says of itself."""

    directory: Path
    pid: int | None
    servers: list[Server] = field(default_factory=list)

    @property
    def clients(self) -> dict[int, str]:
        return {pid: name for server in self.servers for pid, name in server.clients.items()}


class Mps:
    """The control daemon of one directory: this user's, unless another one is named."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_directory() if directory is None else directory
        self.pipe = self.directory / "pipe"
        self.log = self.directory / "log"

    def pid(self) -> int | None:
        """The process id of our daemon, None if it does not run.

        The daemon leaves its id in a file, which outlives it. So the process must also be a control
        daemon of this user, started with our pipes: an id in use by another one never passes.
        """
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.pipe / f"{CONTROL}.pid").read_text())
            if self._is_ours(pid):
                return pid
        # The file may be gone, and what runs without it is ours nevertheless.
        return next((pid for pid in _processes() if self._is_ours(pid)), None)

    def start(self, timeout_s: float = _ANSWER_S) -> int:
        """Start the daemon unless it runs; its process id.

        Raises:
            MpsError: MPS cannot run here, or did not start.
        """
        binary = require_possible()
        self._make_directories()
        with self._alone(timeout_s):
            pid = self.pid()
            return pid if pid is not None else self._launch(binary, timeout_s)

    @contextlib.contextmanager
    def _alone(self, timeout_s: float) -> Iterator[None]:
        # What starts the daemon looks like the daemon until it has ended.
        end = time.monotonic() + timeout_s
        with (self.directory / "start.lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise MpsError(
                            f"somebody else has been starting the daemon of {self.directory} for "
                            f"{timeout_s:g} s; look at the logs in {self.log}"
                        ) from None
                    time.sleep(0.02)
            yield

    def _launch(self, binary: str, timeout_s: float) -> int:
        # The client's settings of whoever starts the daemon would become everybody's defaults, and
        # the GPUs it sees would be all that anybody has, numbered anew.
        env = {key: v for key, v in os.environ.items() if not key.startswith(_CLIENTS)}
        output = self.log / "start.log"
        with output.open("wb") as out:
            done = subprocess.run(
                [binary, "-d"],
                env=env | self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        # Refused because one was started without us, it is there soon, too.
        end = time.monotonic() + (timeout_s if done.returncode == 0 else min(timeout_s, _RACE_S))
        while time.monotonic() < end:
            pid = self.pid()
            if pid is not None:
                return pid
            time.sleep(0.02)
        said = " ".join(output.read_text(errors="replace").split())[-500:] or "nothing"
        raise MpsError(
            f"{binary} -d ended with {done.returncode} and no daemon runs; it said: {said}. "
            f"Look at the logs in {self.log}"
        )

    def status(self) -> Status:
        """The daemon, its servers and their clients; asks nobody if it does not run."""
        pid = self.pid()
        if pid is None:
            return Status(self.directory, None)
        servers = [
            Server(
                server,
                self._state(server),
                {c: _name_of(c) for c in _numbers(self.command(f"get_client_list {server}"))},
            )
            for server in _numbers(self.command("get_server_list"))
        ]
        return Status(self.directory, pid, servers)

    def stop(self, force: bool = False, timeout_s: float = 30.0) -> bool:
        """End the daemon; False if it did not run.

        Args:
            force: also with clients, which lose the GPU, and by signals if it does not answer.
            timeout_s: how long to wait for it to end by itself.

        Raises:
            MpsError: it has clients, or did not end.
        """
        pid = self.pid()
        if pid is None:
            return False
        if force:
            with contextlib.suppress(MpsError):
                self.command("quit -t 2", 2 + _ANSWER_S)
            timeout_s = min(timeout_s, 5.0)
        else:
            clients = self.status().clients
            if clients:
                who = ", ".join(f"{client} ({name})" for client, name in clients.items())
                raise MpsError(
                    f"MPS is in use by {who}: stop them first; --force takes the GPU from them"
                )
            self.command("quit", timeout_s)
        if _ended(pid, timeout_s):
            return True
        if not force:
            raise MpsError(
                f"MPS daemon {pid} did not end within {timeout_s:.0f} s: see {self.log}, "
                "or use --force"
            )
        self._kill(pid)
        return True

    def command(self, text: str, timeout_s: float = _ANSWER_S) -> str:
        """What our daemon answers to a command.

        Raises:
            MpsError: it does not answer.
        """
        binary = find_control()
        try:
            done = subprocess.run(
                [binary],
                env=os.environ | self._environment(),
                input=text + "\n",
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MpsError(
                f"the MPS daemon in {self.directory} does not answer {text!r}: see {self.log}, "
                "or end it with `kvctl mps stop --force`"
            ) from None
        if done.returncode != 0:
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            raise MpsError(f"MPS daemon in {self.directory} refused {text!r}: {said}")
        return done.stdout

    def _state(self, server: int) -> str:
        try:
            return " ".join(self.command(f"get_server_status {server}").split()) or "unknown"
        except MpsError:  # older daemons do not know the question
            return "unknown"

    def _environment(self) -> dict[str, str]:
        return {_PIPES: str(self.pipe), _LOGS: str(self.log)}

    def _make_directories(self) -> None:
        if len(str(self.pipe)) > _LONGEST:
            raise MpsError(
                f"{self.pipe} is too long a name for sockets: set {DIRECTORY} to a shorter one"
            )
        try:
            self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self.directory, self.pipe, self.log):
                path.mkdir(mode=0o700, exist_ok=True)
                found = path.lstat()
                private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
                # Whoever can write there could stand in for the daemon.
                if found.st_uid != os.getuid() or not private:
                    raise MpsError(
                        f"{path} is not a directory of this user alone: remove it, "
                        f"or set {DIRECTORY} to another one"
                    )
        except OSError as error:
            raise MpsError(
                f"{self.directory} cannot be made ({error.strerror}): set {DIRECTORY} to a "
                "directory this user can write"
            ) from None

    def _is_ours(self, pid: int) -> bool:
        process = Path("/proc") / str(pid)
        try:
            if process.stat().st_uid != os.getuid():
                return False
            words = (process / "cmdline").read_bytes().split(b"\0")
            environ = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            return False
        # Without an option it is not the daemon but somebody who asks it something.
        daemon = CONTROL.encode() in (Path(os.fsdecode(w)).name.encode() for w in words[:2])
        pipes = f"{_PIPES}={self.pipe}".encode()
        return daemon and any(w in (b"-d", b"-f") for w in words[1:]) and pipes in environ

    def _kill(self, pid: int) -> None:
        # Servers are the daemon's children, and would stay.
        servers = [child for child in _children(pid) if SERVER in _name_of(child)]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for victim in (*servers, pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, number)
            if _ended(pid, 2.0):
                return
        raise MpsError(f"MPS daemon {pid} does not end: the driver may be stuck")


def find_control() -> str:
    """The control program.

    Raises:
        MpsError: there is none, or MPS does not exist on this system.
    """
    if sys.platform != "linux":
        raise MpsError(f"MPS exists on Linux only, and this is {sys.platform}: run without it")
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE_PLACES))
    binary = shutil.which(CONTROL, path=places)
    if binary is None:
        raise MpsError(
            f"{CONTROL} is not installed: it comes with NVIDIA's driver (package "
            "nvidia-compute-utils on Debian and Ubuntu, nvidia-driver-cuda on Fedora); in a "
            "container add 'compute,utility' to NVIDIA_DRIVER_CAPABILITIES. Or run without MPS"
        )
    return binary


def require_possible() -> str:
    """The control program, where MPS can run.

    Raises:
        MpsError: it cannot; with the remedy.
    """
    binary = find_control()
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        raise MpsError(
            f"no NVIDIA driver answers ({error}), and MPS shares NVIDIA GPUs only: load the "
            "driver (nvidia-smi must list a GPU), or run without MPS"
        ) from None
    if count == 0:
        raise MpsError("the NVIDIA driver shows no GPU: nvidia-smi must list one for MPS")
    return binary


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


def _processes() -> Iterable[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _stat(pid: int) -> list[str]:
    """State and parent first; empty if there is no such process."""
    try:
        # The name, in brackets, may contain anything.
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _gone(pid: int) -> bool:
    fields = _stat(pid)
    return not fields or fields[0] in "ZX"


def _ended(pid: int, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not _gone(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _children(pid: int) -> list[int]:
    return [child for child in _processes() if _stat(child)[1:2] == [str(pid)]]


def _name_of(pid: int) -> str:
    """What a process runs; empty if it is gone, or in another PID namespace."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(Path(os.fsdecode(word)).name for word in words[:3]).strip()
