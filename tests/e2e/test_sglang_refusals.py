# SPDX-License-Identifier: Apache-2.0
"""An elastic SGLang either runs on the elastic path or says at start why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import Models
from tests.support.elastic import elastic_env
from tests.support.server import burst
from tests.support.sglang_fixtures import References
from tests.support.sglang_server import SglangHost, SglangServer

pytest_plugins = ["tests.support.sglang_fixtures"]
pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("args", "env", "remedies"),
    [
        (
            ("--enable-mixed-chunk", "--scheduler-recv-interval=2"),
            {},
            ("drop --enable-mixed-chunk", "use --scheduler-recv-interval 1", "unset ENABLE_KV"),
        ),
        ((), {"ENABLE_KVCACHED": "perhaps"}, ("neither true nor false",)),
        ((), {"KVCACHED_LAYOUT": "layer"}, ("set KVCACHED_LAYOUT to 'block'",)),
        (("--kvcached-config={]",), {}, ("is not JSON",)),
        ((), {"KVCACHED_GUARANTEE": "64MiB"}, ("cannot start",)),
    ],
    ids=["flags", "switch", "layout", "config", "guarantee"],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    models: Models,
    sglang_patched: SglangHost,
    tmp_path: Path,
    args: Sequence[str],
    env: Mapping[str, str],
    remedies: Sequence[str],
) -> None:
    settings = elastic_env(tmp_path / "ledger", capacity="16MiB", page_size="64KiB") | dict(env)
    server = SglangServer("refused", models.llama, tmp_path, args, settings, host=sglang_patched)
    try:
        with pytest.raises(RuntimeError, match=r"ended with -?[1-9]"):
            server.start().wait_ready(120)
    finally:
        server.stop()
    for remedy in remedies:
        assert remedy in server.output()


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
