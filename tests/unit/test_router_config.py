# SPDX-License-Identifier: Apache-2.0
"""The router's configuration: what it takes, and where it says that a mistake is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from kvcached_core.cli import router as command
from kvcached_core.config import ConfigError
from kvcached_core.router.keys import Keys, KeySource, collect
from kvcached_core.router.loading import load

WHOLE = """\
listen: 127.0.0.1:9000
keys:
  - env: ROUTER_KEY
  - file: keys.txt
  - sha256: {digest}
admin_keys: [{{env: ROUTER_KEY}}]
limits: {{body: 8MiB, request_time: 10m}}
health: {{interval: 500ms}}
gpus:
  0: {{max_running: 8, order: fifo}}
models:
  - name: meta-llama/Llama-3.1-8B
    routing: prefix
    ttft: 500ms
    sleep: {{after: 5m, minimum: 10s, level: 2}}
    queue: {{max_waiting: 7, timeout: 3}}
    replicas:
      - url: http://127.0.0.1:8000/v1/
        gpu: 0
      - {{url: "http://127.0.0.1:8001", engine: sglang, key: {{file: engine.txt}}}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "router.yaml"
    path.write_text(text)
    return path


def model(more: str = "") -> str:
    return f"models:\n  - name: m\n    replicas: [{{url: 'http://h:1'}}]\n{more}"


def test_everything_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_KEY", "from-env")
    (tmp_path / "keys.txt").write_text("# clients\nfirst\n\n  second  \n")
    (tmp_path / "engine.txt").write_text("engine-key\n")
    digest = hashlib.sha256(b"hashed").hexdigest()
    loaded = load(write(tmp_path, WHOLE.format(digest=digest)))
    settings = loaded.settings
    assert (settings.listen.address, settings.listen.port) == ("127.0.0.1", 9000)
    for key in ("from-env", "first", "second", "hashed"):
        assert loaded.keys.accepts(key), key
    for key in ("", "# clients", "hashe", digest, "f\u00fcr", "\udc80", None):
        assert not loaded.keys.accepts(key), key
    assert loaded.admin_keys.accepts("from-env")
    assert not loaded.admin_keys.accepts("first")
    (only,) = settings.models
    assert (only.ttft, only.sleep.after, only.sleep.level) == (0.5, 300, 2)
    assert (settings.limits.body, settings.limits.request_time) == (8 << 20, 600)
    assert [replica.url for replica in only.replicas] == [
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
    ]
    assert settings.gpus[only.replicas[0].gpu or ""].max_running == 8
    assert loaded.engine_keys == {"http://127.0.0.1:8001": "engine-key"}


def test_little_is_enough(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, model()))
    assert loaded.settings.listen.is_loopback
    assert not loaded.keys
    assert loaded.settings.models[0].sleep.after is None


def launched(settings: str) -> str:
    return f"models:\n  - name: m\n    replicas: [{{launch: {settings}}}]\n"


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("", "1:1", "models is missing: add it"),
        ("- a", "1:1", "valid dictionary"),
        ("models: [", "1:10", "not YAML"),
        ("a: 1\nmodels: &m [*m]\n", "2:9", "contains itself"),
        ("a: 1\n\na: 2\n", "3:1", "'a' is set a second time, first in line 1"),
        ("<<: {}\n", "1:1", "merging"),
        ("? [a]\n: 1\n", "1:3", "a key must be one word"),
        ("models: []\n", "1:9", "models: "),
        (model("lisen: 1\n"), "4:1", "there is no setting lisen: did you mean 'listen'?"),
        (model("    qqqq: 1\n"), "4:5", "models[0].qqqq: there are name, prefill_rate, pref"),
        (model("    sleep: {afer: 1}\n"), "4:13", "models[0].sleep.afer: did you mean 'after'?"),
        (model("    sleep: {after: soon}\n"), "4:20", "'soon' is not a duration: write e.g. '10s'"),
        (model("    sleep: {level: 3}\n"), "4:20", "models[0].sleep.level"),
        (model("    routing: random\n"), "4:14", "'least-loaded' or 'prefix'"),
        (model("gpus: {a: {order: x}}\n"), "4:19", "'slack' or 'fifo'"),
        (model("gpus: {a: {max_runing: 1}}\n"), "4:12", "did you mean 'max_running'?"),
        (model("limits:\n  body: huge\n"), "5:9", "'huge' is not a size"),
        (model("listen: nowhere\n"), "4:9", "is not ADDRESS:PORT"),
        (model("listen: 0.0.0.0:80\n"), "4:9", "there are no API keys: add 'keys'"),
        (model("listen: host.example:80\n"), "4:9", "there are no API keys: add 'keys'"),
        (model("keys: [{env: NO_SUCH_VARIABLE}]\n"), "4:8", "has no NO_SUCH_VARIABLE: set it"),
        (model("keys:\n  - file: none\n"), "5:5", "No such file"),
        (model("keys:\n  - {file: a, env: b}\n"), "5:5", "exactly one of"),
        (model("keys: [{sha256: abc}]\n"), "4:17", "keys[0].sha256"),
        ("models:\n  - name: m\n", "2:5", "models[0].replicas is missing: add it"),
        ("models:\n  - name: m\n    replicas: [{url: 'h:1'}]\n", "3:22", "is not the URL"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://h:x'}]\n", "3:22", "is not the URL"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://a..b:80'}]\n", "3:22", "is not the"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://" + "\u00e4" * 70 + "'}]\n", "3:22",
         "is not the URL"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://h?a'}]\n", "3:22", "leave that out"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://h', gpu: 3}]\n", "3:39",
         "there is no GPU '3' in 'gpus' (none): add it there"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://h'}, {url: 'http://h/'}]\n", "3:41",
         "is a replica already"),
        ("models:\n  - name: m\n    replicas: [{url: 'http://h'}]\n"
         "  - name: m\n    replicas: [{url: 'http://i'}]\n", "4:11", "is a model 'm' already"),
        ("models:\n  - name: m\n    replicas:\n      - url: http://h\n        key: {sha256: '"
         + "0" * 64 + "'}\n", "5:14", "a hash cannot be sent"),
        (launched("{port: 9}"), "3:25", "write exactly one of 'model' and 'command'"),
        (launched("{port: 9, model: a, command: b}"), "3:25", "exactly one of 'model' and 'comm"),
        (launched("{port: 9, command: ''}"), "3:25", "'command' is the whole command"),
        (launched("{model: a}"), "3:25", "models[0].replicas[0].launch.port is missing: add it"),
        (launched("{port: x, model: a}"), "3:32", "valid integer"),
        (launched("{port: 70000, model: a}"), "3:32", "less than or equal to 65535"),
        (launched("{port: 8080, model: a}"), "3:32", "port 8080 is in use by this file already"),
        (launched("{port: 9, modl: a}"), "3:35", "launch.modl: did you mean 'model'?"),
        (launched("{port: 9, model: a, restart: {dely: 1}}"), "3:55", "did you mean 'delay'?"),
        (launched("{port: 9, model: a, env: {A: [1]}}"), "3:54", "launch.env.A: "),
        (launched("{port: 9, model: a}, url: 'http://h'"), "3:16", "leave 'url' out"),
        (model("    sleep: {kind: cold}\n"), "2:5", "replicas[0] is not: give it 'launch'"),
        (model("    sleep: {at_start: true}\n"), "2:5", "replicas[0] is not: give it 'launch'"),
        (model("gpus: {a: {mps: maybe}}\n"), "4:17", "gpus.a.mps"),
    ],
)  # fmt: skip
def test_a_mistake_has_a_place(tmp_path: Path, text: str, where: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{where}: "), message
    assert said in message


def test_all_mistakes_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, model("    retries: -1\nhealth: {interval: 0}\n"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:5:20", f"{path}:4:14"]


def test_other_machines_need_a_key_or_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTER_KEY", "k")
    load(write(tmp_path, model("listen: 0.0.0.0:80\nkeys: [{env: ROUTER_KEY}]\n")))
    load(write(tmp_path, model("listen: {address: 0.0.0.0, allow_anonymous: true}\n")))
    for address in ("127.0.0.1:1", "'[::1]:1'", "localhost:1", "1"):
        load(write(tmp_path, model(f"listen: {address}\n")))


@pytest.mark.parametrize("content", ["", "# only a comment\n\n"])
def test_an_empty_file_has_no_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigError, match="has no key in it"):
        collect(KeySource(file=Path("keys")), tmp_path)


def test_no_keys_are_false() -> None:
    assert not Keys()
    assert not Keys().accepts("x")


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path, model())
    assert command.main(["check", str(good)]) == 0
    assert "1 models with 1 replicas, nothing wrong" in capsys.readouterr().out
    bad = write(tmp_path, model("lisen: 1\n"))
    assert command.main(["check", str(bad)]) == 1
    assert f"{bad}:4:1: there is no setting lisen" in capsys.readouterr().err
    assert command.main(["check", str(tmp_path / "none.yaml")]) == 1
    assert "name a YAML file" in capsys.readouterr().err
    assert command.main(["check"]) == 2


def test_without_the_extra_the_command_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['yaml'] = None; from kvcached_core.cli.router import main; "
    path = str(write(tmp_path, model()))
    done = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(main(['check', {path!r}]))"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "pip install 'kvcached-core[router]'" in done.stderr
