# SPDX-License-Identifier: Apache-2.0
"""Engines that the router runs: processes that crash, hang, sleep and leave things behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.router.launch.backoff import Backoff
from kvcached_core.router.launch.command import command, environment
from kvcached_core.router.launch.process import EngineProcess
from kvcached_core.router.settings import GpuSettings, ModelSettings, RestartSettings
from tests.support.launched import REPO, UPSTREAM, Site, launch, site
from tests.support.server import free_port
from tests.support.waiting import LONG_S, run, until
from tests.unit.test_router_process import STREAM, ask, get, router

NO_MPS = {"gpus": {"0": {"mps": False, "parallel_starts": 2}}}


def lives(pid: int) -> bool:
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def one(replica: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"models": [{"name": "m", "replicas": [{**replica, "gpu": 0}], **model}], **NO_MPS}


def test_an_engine_is_launched_and_ended(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, one(launch(tmp_path))) as s:
            assert s.router.models["m"].state == "starting"
            answer = await s.complete()
            assert answer.status_code == 200, "requests wait for the engine"
            assert s.router.models["m"].state == "active"
            pid = s.pid()
            health = (await s.client.get("/health/m")).json()["health"]["replicas"][0]
            assert health["process"] == {"phase": "ready", "pid": pid, "starts": 1, "crashes": 0}
        assert not lives(pid)

    run(main)


def test_a_killed_engine_is_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, one(launch(tmp_path))) as s:
            assert (await s.complete()).status_code == 200
            first = s.pid()
            os.kill(first, signal.SIGKILL)
            answers = await asyncio.gather(*(s.complete() for _ in range(20)))
            assert [answer.status_code for answer in answers] == [200] * 20
            supervisor = s.supervisor()
            assert (supervisor.starts, supervisor.crashes) == (2, 1)
            series = (await s.client.get("/metrics")).text
            url = s.router.models["m"].replicas[0].name
            for name, value in (("starts_total", 2), ("crashes_total", 1), ("up", 1)):
                labels = f'{{model="m",replica="{url}"}}'
                assert f"kvcached_router_engine_{name}{labels} {value}.0" in series
            assert "kvcached_router_mps_faults_total 0.0" in series
            assert s.pid() != first

    run(main)


def test_one_that_cannot_start_is_told_with_its_last_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        code = "import sys; print('no such weights'); sys.exit(3)"
        broken = launch(tmp_path, command=[sys.executable, "-c", code])
        async with site(tmp_path, one(broken, queue={"timeout": "1s"})) as s:
            answer = await s.complete()
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "no such weights" in answer.json()["error"]["message"]
            await until(lambda: s.supervisor().crashes >= 3)
            health = await s.client.get("/health/m")
            assert health.status_code == 503
            problem = health.json()["health"]["replicas"][0]["problem"]
            assert "ended with status 3: no such weights" in problem
        assert "ended with status 3: no such weights" in caplog.text

    run(main)


def test_delays_double_up_to_a_bound_and_begin_anew() -> None:
    backoff = Backoff(RestartSettings(delay=1, longest=5, healthy=60))
    delays = [backoff.delay_s]
    for _ in range(5):
        backoff.failed(ready_s=59)
        delays.append(backoff.delay_s)
    assert delays == [0, 1, 2, 4, 5, 5]
    backoff.failed(ready_s=60)
    assert backoff.delay_s == 1
    for _ in range(5000):
        backoff.failed(0)
    assert backoff.delay_s == 5


def test_an_engine_that_hangs_is_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        hangs = launch(tmp_path, hang_time="500ms", stop_time="200ms")
        async with site(tmp_path, {**one(hangs), "health": {"timeout": "200ms"}}) as s:
            assert (await s.complete()).status_code == 200
            first = s.pid()
            os.kill(first, signal.SIGSTOP)
            await until(lambda: s.supervisor().starts == 2)
            assert not lives(first), "SIGTERM did nothing to it, so it was killed"
            assert (await s.complete()).status_code == 200
            assert s.supervisor().crashes == 1

    run(main)


def test_one_that_does_not_get_ready_is_ended(tmp_path: Path) -> None:
    async def main() -> None:
        deaf = launch(tmp_path, command=[sys.executable, "-c", "import time; time.sleep(99)"],
                      start_time="300ms", stop_time="1s")  # fmt: skip
        async with site(tmp_path, one(deaf, queue={"timeout": "500ms"})) as s:
            await until(lambda: s.supervisor().crashes == 1)
            assert "it was not ready within 0.3 s" in s.supervisor().problem

    run(main)


def test_a_port_in_use_is_not_taken_for_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        replica = launch(tmp_path, port=port)
        async with server, site(tmp_path, one(replica, queue={"timeout": "200ms"})) as s:
            await until(lambda: s.supervisor().crashes > 0)
            assert f"port {port} cannot be listened on" in s.supervisor().problem
            assert s.supervisor().starts == 0

    run(main)


# -- sleep by ending ------------------------------------------------------------------------------


def test_a_cold_model_is_started_once_by_many_and_ended_when_idle(tmp_path: Path) -> None:
    async def main() -> None:
        sleep = {"kind": "cold", "at_start": True, "after": "300ms"}
        async with site(tmp_path, one(launch(tmp_path), sleep=sleep)) as s:
            model = s.router.models["m"]
            assert (model.state, s.supervisor().starts) == ("asleep", 0)
            assert (await s.client.get("/health/m")).status_code == 200, "it could serve"
            for cycle in (1, 2):
                answers = await asyncio.gather(*(s.complete() for _ in range(50)))
                assert [answer.status_code for answer in answers] == [200] * 50
                assert s.supervisor().starts == cycle
                pid = s.pid()
                await until(lambda: model.state == "asleep")
                assert not lives(pid)
            assert (model.wakes, model.sleeps, s.supervisor().crashes) == (2, 2, 0)
            assert (await s.client.post("/action/wakeup/m")).status_code == 200
            assert s.supervisor().ready

    run(main)


@pytest.mark.parametrize("kind", ["cold", "engine"])
def test_a_start_that_takes_longer_than_idleness_is_not_cut_short(
    tmp_path: Path, kind: str
) -> None:
    async def main() -> None:
        words = ["sh", "-c", 'sleep 1; exec "$@"', "sh", *UPSTREAM, "0"]
        sleep = {"kind": kind, "after": "200ms"}
        async with site(tmp_path, one(launch(tmp_path, command=words), sleep=sleep)) as s:
            states = []
            while not states or states[-1] != "asleep":
                states.append(s.router.models["m"].state.value)
                await asyncio.sleep(0.02)
            assert "active" in states, "it slept once it had been ready for that long"
            assert s.supervisor().starts == 1

    run(main)


def test_a_cold_wake_that_fails_leaves_it_asleep(tmp_path: Path) -> None:
    async def main() -> None:
        flag = tmp_path / "may-start"
        (tmp_path / "start.sh").write_text(
            f'[ -e {flag} ] || {{ echo no room; exit 9; }}\nexec {" ".join(UPSTREAM[:-1])} "$1" 0\n'
        )
        words = ["sh", str(tmp_path / "start.sh"), "{port}"]
        sleep = {"kind": "cold", "at_start": True, "retry": "100ms"}
        async with site(tmp_path, one(launch(tmp_path, command=words), sleep=sleep)) as s:
            answers = await asyncio.gather(*(s.complete() for _ in range(10)))
            for answer in answers:
                assert answer.status_code == 503
                assert "ended with status 9: no room" in answer.json()["error"]["message"]
                assert "retry-after" in answer.headers
            assert (s.supervisor().starts, s.supervisor().wanted) == (1, False)
            flag.touch()
            await asyncio.sleep(0.15)
            assert (await s.complete()).status_code == 200

    run(main)


def test_a_wake_ends_with_the_router(tmp_path: Path) -> None:
    async def main() -> None:
        sleep = {"kind": "cold", "at_start": True, "minimum": "1h"}
        async with site(tmp_path, one(launch(tmp_path), sleep=sleep)) as s:
            task = asyncio.create_task(s.complete())
            await until(lambda: s.router.models["m"].state == "waking")
            supervisor = s.supervisor()
        await asyncio.wait([task])
        assert [t.get_name() for t in asyncio.all_tasks() if "waking" in t.get_name()] == []
        assert supervisor.starts == 0

    run(main)


def test_an_engine_that_dies_asleep_is_started_by_the_next_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, one(launch(tmp_path))) as s:
            assert (await s.complete()).status_code == 200
            assert (await s.client.post("/action/sleep/m")).status_code == 200
            pid = s.pid()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not s.supervisor().wanted)
            await asyncio.sleep(0.3)
            assert s.supervisor().starts == 1, "it holds no memory while nobody asks"
            assert s.router.models["m"].state == "asleep"
            assert (await s.complete()).status_code == 200
            assert s.supervisor().starts == 2

    run(main)


async def _asleep(s: Site) -> None:
    assert (await s.complete()).status_code == 200
    assert (await s.client.post("/action/sleep/m")).status_code == 200


def test_an_engine_that_cannot_wake_any_more_is_started_anew(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, one(launch(tmp_path), sleep={"retry": "10ms"})) as s:
            await _asleep(s)
            await s.behave(wake_status=500)
            pid = s.pid()
            for _ in range(2):
                answer = await s.complete()
                assert (answer.status_code, s.pid()) == (503, pid)
                assert "out of memory" in answer.json()["error"]["message"]
                await asyncio.sleep(0.02)
            assert (await s.complete()).status_code == 200, "the third attempt, and a start"
            assert (s.supervisor().starts, s.supervisor().crashes) == (2, 1)
            assert s.pid() != pid
            await _asleep(s)
            assert (await s.complete()).status_code == 200
            assert s.supervisor().starts == 2

    run(main)


def test_an_engine_that_has_no_room_is_left_as_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, one(launch(tmp_path), sleep={"retry": "10ms"})) as s:
            await _asleep(s)
            await s.behave(wake_status=503)
            for _ in range(5):
                assert (await s.complete()).status_code == 503
                await asyncio.sleep(0.02)
            await s.behave(wake_status=200)
            assert (await s.complete()).status_code == 200
            assert s.supervisor().starts == 1

    run(main)


def test_a_model_sleeps_at_the_start_by_its_engines_own_means(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, one(launch(tmp_path), sleep={"at_start": True})) as s:
            await until(lambda: s.router.models["m"].state == "asleep")
            assert s.supervisor().ready, "the process is there"
            assert (await s.complete()).status_code == 200
            assert s.supervisor().starts == 1

    run(main)


# -- other settings -------------------------------------------------------------------------------


def test_a_reload_replaces_an_engine_on_its_port(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        async with site(tmp_path, one(launch(tmp_path, 0.02, 40, port=port))) as s:
            assert (await s.complete()).status_code == 200
            first = s.pid()
            streamed = asyncio.create_task(s.complete(stream=True))
            await until(lambda: s.router.models["m"].replicas[0].load == 1)
            s.reconfigure(one(launch(tmp_path, 0, 2, port=port)))
            after = await s.complete(stream=True)
            old = await streamed
            assert old.text.count("data: ") == 41, "what was in flight was served to its end"
            assert after.text.count("data: ") == 3
            assert not lives(first)
            second = s.pid()
            s.reconfigure({"models": [{"name": "n", "replicas": [{"url": "http://127.0.0.1:9"}]}]})
            await until(lambda: not lives(second))

    run(main)


@pytest.mark.parametrize(
    ("gpu", "model"),
    [
        ({"0": {"mps": False, "device": "7"}}, {}),
        (NO_MPS["gpus"], {"sleep": {"after": "1h"}}),
    ],
)
def test_a_reload_that_changes_how_an_engine_is_started_replaces_it(
    tmp_path: Path, gpu: dict[str, Any], model: dict[str, Any]
) -> None:
    async def main() -> None:
        found = one(launch(tmp_path))
        async with site(tmp_path, found) as s:
            assert (await s.complete()).status_code == 200
            first = s.pid()
            s.reconfigure(found)
            s.reconfigure({**found, "gpus": {"0": {"mps": False, "max_running": 3}}})
            assert s.pid() == first, "that is a matter of its queue"
            s.reconfigure({"models": [{**found["models"][0], **model}], "gpus": gpu})
            assert (await s.complete()).status_code == 200
            assert not lives(first)
            variables = read(Path("/proc") / str(s.pid()) / "environ").split(b"\0")
            wanted = b"VLLM_SERVER_DEV_MODE=1" if model else b"CUDA_VISIBLE_DEVICES=7"
            assert wanted in variables

    run(main)


def test_a_command_is_made_from_the_settings() -> None:
    launched = {"port": 8001, "model": "/m", "python": "py", "args": "--x '{port} {name}' --y 2",
                "env": {"A": "{port}", "ENABLE_KVCACHED": True, "N": 3}}  # fmt: skip
    model = ModelSettings.model_validate(
        {"name": "n", "sleep": {"after": 9}, "replicas": [{"launch": launched}]}
    )
    (replica,) = model.replicas
    assert replica.url == "http://127.0.0.1:8001"
    assert command(model, replica) == [
        "py", "-m", "vllm.entrypoints.openai.api_server", "--model", "/m", "--host", "127.0.0.1",
        "--port", "8001", "--served-model-name", "n", "--enable-sleep-mode",
        "--x", "8001 n", "--y", "2",
    ]  # fmt: skip
    sglang = command(model, replica.model_copy(update={"engine": "sglang"}))
    assert sglang[1:5] == ["-m", "sglang.launch_server", "--model-path", "/m"]
    assert {"--enable-memory-saver", "--enable-weights-cpu-backup"} < set(sglang)
    base = {"PATH": "/bin", "ROUTER_KEY": "secret", "CUDA_MPS_PIPE_DIRECTORY": "/elsewhere"}
    env = environment(model, replica, GpuSettings(device=1), base, {"ROUTER_KEY"})  # type: ignore
    assert env == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1",
                   "A": "8001", "ENABLE_KVCACHED": "true", "N": "3"}  # fmt: skip


# -- processes ------------------------------------------------------------------------------------


def test_what_an_engine_leaves_behind_is_ended(tmp_path: Path) -> None:
    async def main() -> None:
        pids = tmp_path / "pids"
        script = f"sleep 99 & echo $! > {pids}; sleep 99 & echo $! >> {pids}; exit 1"
        process = await EngineProcess.start(["sh", "-c", script], dict(os.environ))
        assert await process.wait() == 1
        children = [int(line) for line in pids.read_text().split()]
        assert len(children) == 2
        await until(lambda: not any(map(lives, children)))

    run(main)


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    async def main() -> None:
        log = tmp_path / "log"
        log.write_text("what the run before said\n")
        process = await EngineProcess.start(["/no/such/engine"], dict(os.environ), log=log)
        assert await process.wait() == 127
        said = "/no/such/engine cannot be run: No such file or directory"
        assert process.last_words() == said

    run(main)


def test_a_stop_finishes_what_is_in_flight_and_ends_engines(tmp_path: Path) -> None:
    with router(tmp_path, one(launch(tmp_path, 0.02, 40))) as (url, process):
        pids = []

        def stop(line: bytes) -> None:
            if b"engine 2" in line and not pids:
                health = get(f"{url}/health/m")["health"]["replicas"][0]
                pids.append(health["process"]["pid"])
                process.send_signal(signal.SIGTERM)

        answer = asyncio.run(asyncio.wait_for(ask(url, STREAM, stop), LONG_S))
        assert answer.count(b"data: ") == 41
        assert process.wait(timeout=LONG_S) in (0, -signal.SIGTERM)
        assert pids and not lives(pids[0])


def test_a_killed_router_takes_its_engines_with_it(tmp_path: Path) -> None:
    port, own = free_port(), free_port()
    settings = {"listen": own, **one(launch(tmp_path, port=port))}
    path = tmp_path / "router.yaml"
    path.write_text(json.dumps(settings))
    with (tmp_path / "router.log").open("wb") as out:
        killed = subprocess.Popen(
            [sys.executable, "-m", "kvcached_core.cli.router", "serve", str(path)],
            cwd=REPO, stdout=out, stderr=out,
        )  # fmt: skip
    try:

        def engines() -> list[Path]:
            wanted = f"tests.support.upstream\0{port}\0".encode()
            return [path for path in Path("/proc").glob("[0-9]*/cmdline") if wanted in read(path)]

        end = time.monotonic() + LONG_S
        while not engines():
            assert killed.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        killed.kill()
        while engines():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
