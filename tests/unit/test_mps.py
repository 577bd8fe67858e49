# SPDX-License-Identifier: Apache-2.0
"""MPS: real processes of a stand-in daemon, and real refusals where there is no GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pynvml
import pytest

from kvcached_core import mps as module
from kvcached_core.cli import kvctl
from kvcached_core.config import Config, ConfigError
from kvcached_core.mps import Mps, MpsError, client_environment, require_launched_with
from tests.support import fake_mps


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short one, for sockets."""
    with tempfile.TemporaryDirectory(prefix="mps-") as name:
        yield Path(name) / "mps"
        for pid in list(module._processes()):
            # Whatever a failed test left.
            mine = f"CUDA_MPS_PIPE_DIRECTORY={name}".encode()
            try:
                environ = (Path("/proc") / str(pid) / "environ").read_bytes()
            except OSError:
                continue
            if mine in environ:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in on PATH, and a driver that shows one GPU."""
    program = fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    return program


def clients(mps: Mps, servers: dict[int, list[int]]) -> None:
    (mps.log / "servers.json").write_text(json.dumps(servers))


def lives(pid: int) -> bool:
    return not module._gone(pid)


# -- the daemon -----------------------------------------------------------------------------------


def test_starts_once_and_stops(fake: Path, directory: Path) -> None:
    mps = Mps(directory)
    assert mps.pid() is None
    assert not mps.stop()
    pid = mps.start()
    assert lives(pid)
    assert mps.start() == pid
    assert Mps(directory).pid() == pid
    assert (directory / "pipe").stat().st_mode & 0o777 == 0o700
    assert mps.status().servers == []
    assert mps.stop()
    assert not lives(pid)
    assert mps.pid() is None


def test_those_that_start_it_at_once_get_one(fake: Path, directory: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        pids = list(pool.map(lambda _: Mps(directory).start(), range(3)))
    assert pids == [pids[0]] * 3
    assert Mps(directory).stop()


def test_settings_of_whoever_starts_it_do_not_reach_the_daemon(
    fake: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "10")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    pid = Mps(directory).start()
    environ = (Path("/proc") / str(pid) / "environ").read_bytes()
    assert b"THREAD_PERCENTAGE" not in environ and b"VISIBLE_DEVICES" not in environ


def test_a_killed_daemon_is_seen_as_such(fake: Path, directory: Path) -> None:
    mps = Mps(directory)
    pid = mps.start()
    os.kill(pid, signal.SIGKILL)
    while lives(pid):
        pass
    assert (mps.pipe / "nvidia-cuda-mps-control.pid").exists()
    assert mps.pid() is None
    assert mps.status().pid is None
    (mps.pipe / "control").unlink()
    assert mps.start() != pid


def test_a_daemon_without_its_file_is_found(fake: Path, directory: Path) -> None:
    mps = Mps(directory)
    pid = mps.start()
    (mps.pipe / "nvidia-cuda-mps-control.pid").unlink()
    assert mps.pid() == pid


def test_an_id_of_another_process_is_not_ours(fake: Path, directory: Path) -> None:
    mps = Mps(directory)
    mps.start()
    mps.stop()
    env = os.environ | {"CUDA_MPS_PIPE_DIRECTORY": str(mps.pipe)}
    with subprocess.Popen(["sleep", "600"], env=env) as other:
        (mps.pipe / "nvidia-cuda-mps-control.pid").write_text(str(other.pid))
        assert mps.pid() is None
        assert not mps.stop(force=True)
        assert other.poll() is None
        other.kill()


def test_daemons_of_others_are_left_alone(fake: Path, directory: Path) -> None:
    other = Mps(directory.with_name("b"))
    pid = other.start()
    mps = Mps(directory)
    assert mps.pid() is None
    assert mps.start() != pid
    # Even where its id stands in our file.
    (mps.pipe / "nvidia-cuda-mps-control.pid").write_text(str(pid))
    assert mps.stop(force=True)
    assert lives(pid)
    assert other.stop()


def test_clients_are_shown_and_keep_it_running(fake: Path, directory: Path) -> None:
    mps = Mps(directory)
    pid = mps.start()
    with subprocess.Popen(["sleep", "600"]) as client:
        try:
            clients(mps, {4_000_000: [client.pid, 4_000_001]})
            (server,) = mps.status().servers
            assert (server.pid, server.state) == (4_000_000, "ACTIVE")
            assert list(server.clients) == [client.pid, 4_000_001]
            assert "sleep" in server.clients[client.pid]
            assert server.clients[4_000_001] == ""
            with pytest.raises(MpsError, match=f"in use by {client.pid}.*--force"):
                mps.stop()
        finally:
            client.kill()
    assert lives(pid)
    assert mps.stop(force=True)
    assert not lives(pid)


def test_a_stuck_daemon_ends_by_force_only(
    fake: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "stuck")
    monkeypatch.setattr(module, "_ANSWER_S", 0.3)
    mps = Mps(directory)
    pid = mps.start(timeout_s=10)
    while not (mps.log / "server.pid").exists():
        pass
    server = int((mps.log / "server.pid").read_text() or 0)
    with pytest.raises(MpsError, match=r"does not answer.*--force"):
        mps.command("get_server_list", 0.3)
    assert lives(pid)
    assert mps.stop(force=True, timeout_s=0.3)
    assert not lives(pid)
    while lives(server):
        pass


# -- refusals -------------------------------------------------------------------------------------


def test_a_daemon_that_does_not_start_says_why(
    fake: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "refuses")
    with pytest.raises(MpsError, match=r"cannot do it: a reason.*logs in"):
        Mps(directory).start()


def test_a_directory_open_to_others_is_refused(fake: Path, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    with pytest.raises(MpsError, match="not a directory of this user alone"):
        Mps(directory).start()


def test_a_link_is_refused(fake: Path, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MpsError, match="not a directory of this user alone"):
        Mps(directory).start()


def test_a_name_too_long_for_sockets_is_refused(fake: Path, directory: Path) -> None:
    with pytest.raises(MpsError, match="KVCACHED_MPS_DIR"):
        Mps(directory / ("x" * 80)).start()


def _has_gpu() -> bool:
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False


@pytest.mark.skipif(_has_gpu(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    program = fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(MpsError, match=r"no NVIDIA driver answers.*run without MPS"):
        Mps(directory).start()
    assert not directory.exists()


def test_without_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_MORE_PLACES", ())
    with pytest.raises(MpsError, match=r"not installed.*NVIDIA_DRIVER_CAPABILITIES"):
        Mps(directory).start()


def test_on_another_system(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MpsError, match="Linux only"):
        Mps(directory).start()


# -- what clients are started with ----------------------------------------------------------------


def test_environment_of_a_client(directory: Path) -> None:
    plain = client_environment(Config(), directory)
    assert plain == {
        "CUDA_MPS_PIPE_DIRECTORY": str(directory / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(directory / "log"),
    }
    config = Config.load({}, {"KVCACHED_SM_SHARE": "40", "KVCACHED_MPS_MEMORY": "24GiB"})
    more = client_environment(config, directory, devices=(0, 1))
    assert more["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "40"
    assert more["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=24576M,1=24576M"


@pytest.mark.parametrize("value", ["0", "101", "some"])
def test_impossible_shares_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="KVCACHED_SM_SHARE"):
        Config.load({}, {"KVCACHED_SM_SHARE": value})


def test_settings_that_would_be_ignored_are_refused(directory: Path) -> None:
    config = Config(sm_share=40)
    with pytest.raises(ConfigError, match=r"kvctl mps env"):
        require_launched_with(config, {})
    require_launched_with(config, client_environment(config, directory))
    require_launched_with(Config(), {})


def test_directory_of_this_user(tmp_path: Path) -> None:
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert module.default_directory(runtime) == tmp_path / "kvcached" / "mps"
    assert module.default_directory(runtime | {"KVCACHED_MPS_DIR": "/x"}) == Path("/x")
    fallback = Path(tempfile.gettempdir()) / f"kvcached-{os.getuid()}" / "mps"
    assert module.default_directory({}) == fallback
    assert module.default_directory({"XDG_RUNTIME_DIR": "/nowhere"}) == fallback


# -- kvctl ----------------------------------------------------------------------------------------


def test_kvctl(fake: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ctl(*args: str) -> tuple[int, str, str]:
        status = kvctl.main(["mps", *args, "--dir", str(directory)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    assert ctl("status")[0] == 1
    status, _, error = ctl("env")
    assert (status, "kvctl mps start" in error) == (1, True)
    assert ctl("start")[0] == 0
    started = json.loads(ctl("start", "--json")[1])
    assert not started["started"]
    clients(Mps(directory), {4_000_000: [os.getpid()]})
    shown = ctl("status")
    assert shown[0] == 0
    assert f"client {os.getpid()}" in shown[1]
    found = json.loads(ctl("status", "--json")[1])
    assert found["pid"] == started["pid"]
    assert found["servers"][0]["clients"] == {str(os.getpid()): module._name_of(os.getpid())}
    status, exports, _ = ctl("env")
    shell = shutil.which("sh")
    assert shell is not None
    said = subprocess.run(
        [shell, "-c", f"{exports}\necho $CUDA_MPS_PIPE_DIRECTORY"], capture_output=True, text=True
    )
    assert (status, said.stdout.strip()) == (0, str(directory / "pipe"))
    status, _, error = ctl("stop")
    assert (status, "--force" in error) == (1, True)
    assert ctl("stop", "--force")[1] == "stopped\n"
    assert ctl("stop")[0] == 0
