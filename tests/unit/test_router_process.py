# SPDX-License-Identifier: Apache-2.0
"""`kvcached-router` as a process, with engines that are killed, and with a thousand streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.router.serve import _bind
from tests.support.server import free_port
from tests.support.upstream import DONE

REPO = Path(__file__).resolve().parents[2]
LONG_S = 30.0
STREAMS = 1000


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """For a thousand connections here and at each end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * STREAMS:
        pytest.fail(f"the limit of open files is {hard}: raise it to {4 * STREAMS} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def process(
    *args: object, log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        command = [sys.executable, "-m", *map(str, args)]
        started = subprocess.Popen(
            command, cwd=REPO, stdout=out, stderr=out, env=os.environ | (env or {})
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait(timeout=LONG_S)


def get(url: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=LONG_S) as answer:
        return json.loads(answer.read())


def until(what: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LONG_S
    while True:
        with contextlib.suppress(OSError):
            if what():
                return
        assert all(each.poll() is None for each in processes), "a process ended"
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


@contextlib.contextmanager
def router(
    tmp_path: Path, settings: dict[str, Any], env: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    path = tmp_path / "router.yaml"
    path.write_text(json.dumps({"listen": f"127.0.0.1:{port}", **settings}))
    url = f"http://127.0.0.1:{port}"
    log = tmp_path / "router.log"
    with process("kvcached_core.cli.router", "serve", path, log=log, env=env) as started:
        until(lambda: get(f"{url}/health")["status"] == "healthy", started)
        yield url, started


@contextlib.contextmanager
def engine(tmp_path: Path, *numbers: float) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    log = tmp_path / f"engine-{port}.log"
    with process("tests.support.upstream", port, *numbers, log=log) as started:
        url = f"http://127.0.0.1:{port}"
        until(lambda: not get(f"{url}/is_sleeping")["is_sleeping"], started)
        yield url, started


def models(*urls: str, **more: Any) -> dict[str, Any]:
    return {"models": [{"name": "m", "replicas": [{"url": url} for url in urls], **more}]}


async def ask(url: str, body: bytes, on_line: Callable[[bytes], None] | None = None) -> bytes:
    """All that comes until the connection ends, headers included."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    got = bytearray()
    while line := await reader.readline():
        got += line
        if on_line is not None:
            on_line(line)
    writer.close()
    return bytes(got)


STREAM = json.dumps({"model": "m", "prompt": "hi", "stream": True}).encode()


def test_a_thousand_streams_at_once(tmp_path: Path) -> None:
    with engine(tmp_path, 0, 5, STREAMS) as (upstream, _):
        settings = {"gpus": {"0": {"max_running": STREAMS}}}
        replicas = [{"url": upstream, "gpu": 0}]
        settings |= {"models": [{"name": "m", "replicas": replicas}]}
        with router(tmp_path, settings) as (url, _):

            async def main() -> list[bytes]:
                begin = time.monotonic()
                # The engine holds each after its first token until all of them are there.
                tasks = [asyncio.create_task(ask(url, STREAM)) for _ in range(STREAMS)]
                answers = await asyncio.wait_for(asyncio.gather(*tasks), 60)
                print(f"{STREAMS} streams in {time.monotonic() - begin:.1f} s")
                return answers

            answers = asyncio.run(main())
            for answer in answers:
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert answer.count(b"data: ") == 6
                assert answer.endswith(b"0\r\n\r\n"), "a whole answer, not one that was cut"
                assert DONE.strip() in answer
            stats = get(f"{url}/traffic/stats/m")["model_stats"]
            assert stats["successful_requests"] == STREAMS


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    pages = int((Path("/proc") / str(pid) / "statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_clients_that_do_not_read_cost_nobody_else(tmp_path: Path) -> None:
    slow = 30
    flooding = engine(tmp_path, 0, 1_000_000, 0, 16 << 10)
    with flooding as (endless, flood), engine(tmp_path, 0, 3) as (quick, _):
        settings = {
            "limits": {"stall_time": "4s"},
            "models": [
                {"name": "m", "replicas": [{"url": endless}]},
                {"name": "other", "replicas": [{"url": quick}]},
            ],
        }
        with router(tmp_path, settings) as (url, started):
            ask_other = json.dumps({"model": "other", "prompt": "hi"}).encode()
            get(f"{url}/v1/completions", ask_other)
            # More than all of the slow ones may cost.
            request = urllib.request.Request(f"{url}/v1/completions", STREAM)
            with urllib.request.urlopen(request, timeout=LONG_S) as answer:
                assert len(answer.read(2 * slow << 20)) == 2 * slow << 20
            before = resident(started.pid), resident(flood.pid)
            host, port = url.removeprefix("http://").split(":")
            head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(STREAM)}\r\n"
            connections = []
            for _ in range(slow):
                connection = socket.create_connection((host, int(port)))
                connection.sendall(f"{head}\r\n".encode() + STREAM)
                connections.append(connection)
            assert all(c.recv(16).startswith(b"HTTP/1.1 200") for c in connections)
            took = []
            for _ in range(40):
                begin = time.monotonic()
                assert get(f"{url}/v1/completions", ask_other)["choices"]
                took.append(time.monotonic() - begin)
                time.sleep(0.05)
            grew = [resident(started.pid) - before[0], resident(flood.pid) - before[1]]
            print(f"{slow} that do not read: {[g >> 20 for g in grew]} MiB more in router and "
                  f"engine, others answered after {sorted(took)[20] * 1e3:.0f} ms, "
                  f"{max(took) * 1e3:.0f} at most")  # fmt: skip
            assert max(grew) < slow * (1 << 20)
            assert max(took) < 1
            # In the end they are given up, and with them their requests in the engine.
            health = f"{url}/health/all"
            until(lambda: get(health)["models"]["m"]["replicas"][0]["requests"] == 0, started)
            for connection in connections:
                connection.close()


def test_an_engine_is_killed_mid_stream(tmp_path: Path) -> None:
    with engine(tmp_path, 0.002) as (first, victim), engine(tmp_path, 0, 3) as (second, _):
        settings = {**models(first), "health": {"interval": "50ms"}}
        with router(tmp_path, settings) as (url, started):

            def kill(line: bytes) -> None:
                if b"engine 20" in line:
                    victim.kill()

            answer = asyncio.run(asyncio.wait_for(ask(url, STREAM, kill), LONG_S))
            assert b"engine 20" in answer
            assert not answer.endswith(b"0\r\n\r\n"), "nobody takes it for a whole answer"
            assert DONE.strip() not in answer
            last = answer[answer.rindex(b"data: ") :].splitlines()[0].removeprefix(b"data: ")
            assert json.loads(last)["error"]["code"] == "engine_failed"
            until(lambda: get(f"{url}/health/all")["models"]["m"]["state"] == "failed", started)
            refused = asyncio.run(ask(url, STREAM))
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: " in refused.lower()

            # Another one is added by SIGHUP, and serves.
            path = tmp_path / "router.yaml"
            listen = json.loads(path.read_text())["listen"]
            path.write_text(json.dumps({"listen": listen, **models(first, second)}))
            started.send_signal(signal.SIGHUP)
            until(lambda: get(f"{url}/get_server_info")["reloads"] == 1, started)
            assert DONE.strip() in asyncio.run(ask(url, STREAM))

            path.write_text("models: 1\n")
            started.send_signal(signal.SIGHUP)
            until(lambda: "models: Input should be" in (tmp_path / "router.log").read_text())
            assert DONE.strip() in asyncio.run(ask(url, STREAM))


def test_a_stop_finishes_what_is_in_flight(tmp_path: Path) -> None:
    with (
        engine(tmp_path, 0.02, 30) as (upstream, _),
        router(tmp_path, models(upstream)) as (
            url,
            started,
        ),
    ):

        def stop(line: bytes) -> None:
            if b"engine 2" in line and started.poll() is None:
                started.send_signal(signal.SIGTERM)

        answer = asyncio.run(asyncio.wait_for(ask(url, STREAM, stop), LONG_S))
        assert answer.endswith(b"0\r\n\r\n")
        assert answer.count(b"data: ") == 31
        assert started.wait(timeout=LONG_S) == 0
        with pytest.raises(urllib.error.URLError):
            get(f"{url}/health")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_acknowledgements(address: str) -> None:
    async def main() -> bool:
        nodelay: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got = writer.get_extra_info("socket")
            nodelay.set_result(bool(got.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        with _bind(address, 0) as listening:
            port = listening.getsockname()[1]
            async with await asyncio.start_server(accepted, sock=listening):
                _, writer = await asyncio.open_connection(address, port)
                try:
                    return await nodelay
                finally:
                    writer.close()

    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    assert asyncio.run(main())


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with router(tmp_path, models("http://127.0.0.1:9")) as (url, _):
        path = tmp_path / "router.yaml"
        done = subprocess.run(
            [sys.executable, "-m", "kvcached_core.cli.router", "serve", str(path)],
            capture_output=True,
            text=True,
            timeout=LONG_S,
            cwd=REPO,
            env=dict(os.environ),
        )
        assert done.returncode == 1
        port = url.rpartition(":")[2]
        assert f"cannot listen on 127.0.0.1:{port}: " in done.stderr
        assert "name another address in 'listen'" in done.stderr
