# SPDX-License-Identifier: Apache-2.0
"""Stands in for `nvidia-cuda-mps-control`: the same processes, files and questions, and no GPU.

`FAKE_MPS` in its environment makes it fail: `refuses` (does not start), `stuck` (answers nothing).
Its servers and their clients are read from `servers.json` in the log directory, and what it says of
their state from `state`. With the name
`nvidia-cuda-mps-server` it is a server, which does nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def install(folder: Path) -> Path:
    """Both programs in `folder`, to be put on PATH; returns the control program."""
    folder.mkdir(parents=True, exist_ok=True)
    text = Path(__file__).read_text()
    for name in ("nvidia-cuda-mps-server", "nvidia-cuda-mps-control"):
        program = folder / name
        program.write_text(f"#!{sys.executable}\n{text}")
        program.chmod(0o755)
    return program


def _daemon(pipe: Path, log: Path) -> None:
    mode = os.environ.get("FAKE_MPS", "")
    if mode == "refuses":
        print("cannot do it: a reason", file=sys.stderr)
        raise SystemExit(1)
    lock = os.open(pipe / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("An instance of this daemon is already running", file=sys.stderr)
        raise SystemExit(1) from None
    if os.fork():
        return
    os.setsid()
    (pipe / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")
    if mode == "stuck":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server = shutil.which("nvidia-cuda-mps-server")
        assert server is not None
        child = subprocess.Popen([server])
        (log / "server.pid").write_text(str(child.pid))
        time.sleep(600)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(pipe / "control"))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                words = stream.readline().split()
                if words[0] == "quit":
                    (pipe / "nvidia-cuda-mps-control.pid").unlink()
                    return
                stream.write(_answer(words, log))


def _answer(words: list[str], log: Path) -> str:
    file = log / "servers.json"
    servers = json.loads(file.read_text()) if file.exists() else {}
    if words[0] == "get_server_list":
        return "".join(f"{pid}\n" for pid in servers)
    if words[0] == "get_client_list":
        return "".join(f"{pid}\n" for pid in servers[words[1]])
    state = log / "state"
    return state.read_text() if state.exists() else "ACTIVE\n"


def main() -> None:
    if Path(sys.argv[0]).name.endswith("server"):
        time.sleep(600)
    pipe = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    log = Path(os.environ["CUDA_MPS_LOG_DIRECTORY"])
    if sys.argv[1:] == ["-d"]:
        _daemon(pipe, log)
        return
    with socket.socket(socket.AF_UNIX) as connection:
        if os.environ.get("FAKE_MPS") == "stuck":
            time.sleep(600)
        connection.connect(str(pipe / "control"))
        with connection.makefile("rw") as stream:
            stream.write(sys.stdin.readline())
            stream.flush()
            print(stream.read(), end="")


if __name__ == "__main__":
    main()
