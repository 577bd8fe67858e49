# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections.abc import Iterator
from email.message import Message
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError

import pytest

from engine_forks import fetch as fetch_verb
from engine_forks.errors import ForkError
from engine_forks.fetch import find_url
from engine_forks.pin import ANY_PYTHON, REPO, Artifact, load_pin, pin_names
from engine_forks.wheel import wheel_identity
from tests.forks.fake_engine import PIN, Fork


@pytest.fixture
def http_index(fork: Fork) -> Iterator[str]:
    handler = partial(_Quiet, directory=str(fork.index))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    login: str | None = None
    cut_short: int = 0

    def do_GET(self) -> None:
        if self.login is not None and self.headers.get("Authorization") != self.login:
            self.send_error(401)
        else:
            super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if _Quiet.cut_short:
            _Quiet.cut_short -= 1
            outputfile.write(source.read(10))
        else:
            super().copyfile(source, outputfile)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_fetches_and_verifies(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    assert fork.run("fetch", "source", "cpu", "cuda") == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    originals = [fork.archive, fork.wheel("cpu"), fork.wheel("cuda")]
    assert [path.name for path in printed] == [path.name for path in originals]
    for copy, original in zip(printed, originals, strict=True):
        assert copy.parent == fork.cache
        assert copy.read_bytes() == original.read_bytes()


def test_works_over_http(fork: Fork, http_index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{http_index}/")
    assert fork.run("fetch", "source") == 0
    assert (fork.cache / fork.archive.name).read_bytes() == fork.archive.read_bytes()


def test_tampered_download_is_refused(fork: Fork, capsys: pytest.CaptureFixture[str]) -> None:
    fork.archive.write_bytes(fork.archive.read_bytes() + b"x")
    assert fork.run("fetch", "source") == 1
    assert "the pin says" in capsys.readouterr().err
    assert list(fork.cache.iterdir()) == []


def test_damaged_cache_is_replaced(fork: Fork) -> None:
    fork.cache.mkdir()
    damaged = fork.cache / fork.archive.name
    damaged.write_bytes(b"half a downl")
    assert fork.run("fetch", "source") == 0
    assert damaged.read_bytes() == fork.archive.read_bytes()


def test_good_cache_needs_no_index(fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fork.run("fetch", "source") == 0
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere")
    assert fork.run("fetch", "source") == 0


def test_unreachable_index_says_what_to_do(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere")
    assert fork.run("fetch", "source") == 1
    error = capsys.readouterr().err
    assert "PIP_INDEX_URL" in error
    assert "--cache" in error


def test_file_missing_from_index(fork: Fork) -> None:
    with pytest.raises(ForkError, match="does not list"):
        find_url(Artifact("fakeng", "fakeng-9.tar.gz", "0"))


def test_refuses_other_schemes(fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "ftp://example.org/simple")
    with pytest.raises(ForkError, match="'ftp' is not supported"):
        find_url(load_pin(PIN, fork.root).source)


class _Flaky:
    """Stands in for the network: fails some times, then answers as the network would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: OSError) -> None:
        self.errors = list(errors)
        self.waits: list[float] = []
        self._open = fetch_verb._open
        monkeypatch.setattr(fetch_verb, "_open", self)
        monkeypatch.setattr("time.sleep", self.waits.append)

    def __call__(self, url: str) -> BinaryIO:
        if self.errors:
            raise self.errors.pop(0)
        return self._open(url)


def http_error(code: int) -> HTTPError:
    return HTTPError("http://index", code, "said the server", Message(), None)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(), TimeoutError(), URLError("name lookup"), http_error(503)]
)
def test_failures_that_may_pass_are_retried(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    network = _Flaky(monkeypatch, error, error)
    assert fork.run("fetch", "source") == 0
    assert (network.errors, network.waits) == ([], [2, 4])


def test_retries_end(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = _Flaky(monkeypatch, *[ConnectionResetError("reset")] * 9)
    assert fork.run("fetch", "source") == 1
    assert "reset" in capsys.readouterr().err
    assert len(network.errors) == 6


@pytest.mark.parametrize("error", [http_error(404), http_error(403), PermissionError("denied")])
def test_failures_that_stay_are_not_retried(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    network = _Flaky(monkeypatch, error)
    assert fork.run("fetch", "source") == 1
    assert network.waits == []


def test_file_gone_from_the_server(
    fork: Fork,
    http_index: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", http_index)
    fork.archive.unlink()
    assert fork.run("fetch", "source") == 1
    assert "404" in capsys.readouterr().err


def test_body_cut_short_is_retried(
    fork: Fork, http_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the index's page, then the file: neither may pass for a tampered one."""
    monkeypatch.setenv("PIP_INDEX_URL", http_index)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    url = find_url(load_pin(PIN, fork.root).source)
    monkeypatch.setattr(_Quiet, "cut_short", 1)
    assert find_url(load_pin(PIN, fork.root).source) == url
    monkeypatch.setattr(fetch_verb, "find_url", lambda artifact: url)
    monkeypatch.setattr(_Quiet, "cut_short", 2)
    assert fork.run("fetch", "source") == 0
    assert _Quiet.cut_short == 0


def test_index_with_a_password(
    fork: Fork,
    http_index: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_Quiet, "login", "Basic bWU6cEBzcw==")
    monkeypatch.setenv("PIP_INDEX_URL", http_index)
    assert fork.run("fetch", "source") == 1
    monkeypatch.setenv("PIP_INDEX_URL", http_index.replace("//", "//me:p%40ss@"))
    assert fork.run("fetch", "source") == 0
    fork.archive.unlink()
    (fork.cache / fork.archive.name).unlink()
    assert fork.run("fetch", "source") == 1
    assert "p%40ss" not in capsys.readouterr().err


def test_unknown_pin_names_the_known(fork: Fork) -> None:
    with pytest.raises(ForkError, match=f"no pin 'other-1'; there is: {PIN}"):
        load_pin("other-1", fork.root)


@pytest.mark.parametrize("text", ["not toml", 'engine = "x"', 'source = "text"'])
def test_broken_pin_is_named(fork: Fork, text: str) -> None:
    (fork.root / "engine_forks" / "pins" / "bad.toml").write_text(text)
    with pytest.raises(ForkError, match=r"bad\.toml: not a valid pin"):
        load_pin("bad", fork.root)


def test_unreleased_variant_and_machine_are_named(fork: Fork) -> None:
    pin = load_pin(PIN, fork.root)
    with pytest.raises(ForkError, match="no variant 'rocm'; it has: cpu, cuda"):
        pin.wheel("rocm")
    with pytest.raises(ForkError, match="not released for 'vax'"):
        pin.wheel("cpu", "vax")


@pytest.mark.parametrize("name", pin_names())
def test_this_repository_s_pins(name: str) -> None:
    pin = load_pin(name)
    assert pin.name == name
    assert pin.patches == REPO / "patches" / pin.engine / pin.version
    wheels = [
        (machine, python, artifact)
        for variant in pin.variants.values()
        for machine, by_python in variant.wheels.items()
        for python, artifact in by_python.items()
    ]
    for artifact in (pin.source, *(artifact for _, _, artifact in wheels)):
        assert pin.version in artifact.file
        assert len(bytes.fromhex(artifact.sha256)) == 32
        # The index's spelling of a project and a file name's differ in the dash only.
        assert artifact.file.startswith(f"{artifact.project.replace('-', '_')}-")
    for variant in pin.variants.values():
        assert set(variant.wheels) == {"x86_64", "aarch64"}
    for machine, python, artifact in wheels:
        tags = wheel_identity(Path(artifact.file))[2]
        assert machine in tags
        assert tags.startswith(f"{python}-") if python != ANY_PYTHON else "-abi3-" in tags
    # Two variants of one wheel must not have one name.
    names = {
        (artifact.project, pin.fork_version(name), python, machine)
        for name, variant in pin.variants.items()
        for machine, by_python in variant.wheels.items()
        for python, artifact in by_python.items()
    }
    assert len(names) == len(wheels)
    # An engine that looks for "cpu" in its version must not find it in a fork for a GPU.
    assert "cpu" not in pin.fork_version("cuda")
