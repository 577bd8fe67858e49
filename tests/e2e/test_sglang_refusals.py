# SPDX-License-Identifier: Apache-2.0
"""An elastic SGLang either runs on the elastic path or says at start why it cannot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import Models
from tests.support.elastic import elastic_env, ledger_path
from tests.support.server import burst
from tests.support.sglang_fixtures import References
from tests.support.sglang_server import SglangHost, SglangServer
from tests.support.watch import wait_until

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(300)


# Those that SGLang itself lets pass on a CPU.
FLAGS = {
    "disaggregation": ("--disaggregation-mode=decode", "--disaggregation-transfer-backend=fake"),
    "hierarchical": ("--enable-hierarchical-cache",),
    "lmcache": ("--enable-lmcache",),
    "hisparse": ("--enable-hisparse",),
    "unified-memory": ("--enable-unified-memory", "--attention-backend=triton"),
    "page-major": ("--enable-page-major-kv-layout", "--attention-backend=triton"),
    "mixed-chunk": ("--enable-mixed-chunk",),
    "pp-size": ("--pp-size=2",),
    "dp-attention": ("--enable-dp-attention",),
    "attn-cp-size": ("--attn-cp-size=2", "--tp-size=2"),
    "nnodes": ("--nnodes=2", "--tp-size=2", "--dist-init-addr=127.0.0.1:9"),
    "scheduler-recv-interval": ("--scheduler-recv-interval=2",),
    "pdmux": ("--enable-pdmux",),
    "int8-mamba-checkpoint": ("--enable-int8-mamba-checkpoint",),
    "dllm": ("--dllm-algorithm=LowConfidence",),
    "attention-backend": ("--attention-backend=flex_attention",),
}
# What the message must hold besides the flag itself.
SETTINGS = {
    "layout": ({"KVCACHED_LAYOUT": "layer"}, "set KVCACHED_LAYOUT to 'block'"),
    "hnd": ({"SGLANG_USE_HND_KVCACHE": "1"}, "unset it"),
    "cpp-tree": ({"SGLANG_EXPERIMENTAL_CPP_RADIX_TREE": "1"}, "unset SGLANG_EXPERIMENTAL_CPP"),
    "unified-tree": ({"SGLANG_ENABLE_UNIFIED_RADIX_TREE": "1"}, "SGLANG_ENABLE_UNIFIED_RADIX_TREE"),
    "switch": ({"ENABLE_KVCACHED": "perhaps"}, "set it to 'true' or unset it"),
    "size": ({"KVCACHED_PAGE_SIZE": "huge"}, "KVCACHED_PAGE_SIZE"),
    # From here on a scheduler process finds out.
    "page-size": ({"KVCACHED_PAGE_SIZE": "1000"}, "set KVCACHED_PAGE_SIZE to a multiple"),
    "guarantee": ({"KVCACHED_GUARANTEE": "64MiB"}, "cannot start"),
    "directory": ({"KVCACHED_LEDGER_DIR": "/dev/null/ledger"}, "set KVCACHED_LEDGER_DIR"),
}


class Refused(Protocol):
    def __call__(self, *args: str, **env: str) -> str: ...


@pytest.fixture
def refused(models: Models, sglang_patched: SglangHost, tmp_path: Path) -> Refused:
    """Starts a server, which must end of itself, and returns what it says last."""

    def start(*args: str, **env: str) -> str:
        settings = elastic_env(tmp_path / "ledger", capacity="16MiB") | env
        server = SglangServer(
            "refused", models.llama, tmp_path, args, settings, host=sglang_patched
        )
        try:
            with pytest.raises(RuntimeError, match=r"ended with -?[1-9]"):
                server.start().wait_ready(120)
        finally:
            server.stop()
        output = server.output()
        assert "ConfigError: " in output, output[-3000:]
        return output[output.index("ConfigError: ") :]

    return start


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_cannot_work_are_named(refused: Refused, name: str) -> None:
    error = refused(*FLAGS[name])
    assert name in error
    assert "drop --" in error or "use --" in error or "pass --" in error
    assert "unset ENABLE_KVCACHED" in error


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_work_are_refused_with_the_remedy(refused: Refused, name: str) -> None:
    env, remedy = SETTINGS[name]
    assert remedy in refused(**env)


@pytest.mark.parametrize("text", ["{]", "[1]", '{"pagesize": "2MiB"}'])
def test_a_configuration_that_is_none(refused: Refused, text: str) -> None:
    error = refused(f"--kvcached-config={text}")
    assert "--kvcached-config" in error or "no setting 'pagesize'" in error


def test_a_model_of_windows_only(
    models: Models, sglang_patched: SglangHost, tmp_path: Path
) -> None:
    model = shutil.copytree(models.cohere, tmp_path / "windows")
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config |= {"hybrid_layer_pattern": [1] * layers, "layer_types": ["sliding_attention"] * layers}
    (model / "config.json").write_text(json.dumps(config))
    env = elastic_env(tmp_path / "ledger", capacity="16MiB")
    server = SglangServer("windows", model, tmp_path, (), env, host=sglang_patched)
    try:
        with pytest.raises(RuntimeError, match=r"ended with -?[1-9]"):
            server.start().wait_ready(120)
    finally:
        server.stop()
    assert "windows in every layer allow no pages; pass --disable-hybrid-swa" in server.output()


def test_several_obstacles_are_told_at_once(refused: Refused) -> None:
    error = refused("--enable-mixed-chunk", "--scheduler-recv-interval=2")
    for remedy in ("drop --enable-mixed-chunk", "use --scheduler-recv-interval 1"):
        assert remedy in error


def test_a_ledger_with_nothing_left(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir(mode=0o700)
    ledger = Ledger(ledger_path(tmp_path / "ledger"), 16 << 20, 0)
    greedy = ledger.join("greedy")
    assert greedy.lease(ledger.available())
    error = refused(KVCACHED_START_WAIT_MS="200")
    assert "greedy" in error and "Free memory" in error
    greedy.leave()


def test_living_members_with_another_capacity(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir(mode=0o700)
    ledger = Ledger(ledger_path(tmp_path / "ledger"), 8 << 20, 0)
    member = ledger.join("other")
    error = refused()
    assert str(8 << 20) in error and "capacity" in error
    member.leave()


def test_a_refused_server_leaves_no_process(
    models: Models, sglang_patched: SglangHost, tmp_path: Path
) -> None:
    env = elastic_env(tmp_path / "ledger", page_size="1000")
    server = SglangServer("refused", models.llama, tmp_path, (), env, host=sglang_patched)
    try:
        server.start()
        with pytest.raises(RuntimeError, match=r"ended with -?[1-9]"):
            server.wait_ready(120)
        wait_until(lambda: not _is_there(server.pid), 10, "no process of it is left")
    finally:
        server.stop()
    assert "set KVCACHED_PAGE_SIZE to a multiple" in server.output()


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_switched_off_it_is_the_released_engine(
    models: Models,
    sglang_patched: SglangHost,
    sglang_references: Callable[[], References],
    tmp_path: Path,
) -> None:
    env = elastic_env(tmp_path / "ledger", capacity="16MiB") | {"ENABLE_KVCACHED": "false"}
    args = ["--max-total-tokens=20000"]
    server = SglangServer("off", models.llama, tmp_path, args, env, host=sglang_patched)
    try:
        server.start().wait_ready()
        reference = sglang_references().mixed.part(0, 12, 16)
        reference.check(burst(server, reference.prompts, reference.max_tokens))
        assert "kvcached" not in server.get("/metrics")
    finally:
        server.stop()
    assert not (tmp_path / "ledger").exists()
