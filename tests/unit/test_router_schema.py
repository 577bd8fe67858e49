# SPDX-License-Identifier: Apache-2.0
"""The router against its own description: whatever is sent, it does not fail, and answers so."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from kvcached_core.router.app import FORWARDED
from kvcached_core.router.body import Bodies
from kvcached_core.router.memory import Memory
from kvcached_core.router.openapi import describe
from kvcached_core.router.operate import Operations
from kvcached_core.router.settings import LimitSettings
from tests.unit.test_router_process import engine, get, router

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("schema")
    with engine(folder, 0, 3) as (upstream, _):
        names = ["plain", "org/with-a-slash"]
        models = [{"name": name, "replicas": [{"url": upstream}]} for name in names]
        memory = {"ledger_dir": str(folder)}
        with router(folder, {"models": models, **memory}) as (found, _):
            yield found


OPERATIONS = [
    (method.upper(), path) for path, item in describe(["m"])["paths"].items() for method in item
]


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_makes_it_fail(document: Any, method: str, path: str, mode: Any) -> None:
    try:
        cases = document[path][method].as_strategy(generation_mode=mode)

        @given(cases)
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "nothing can be wrong where nothing is sent"


def test_everything_there_is_is_described() -> None:
    described = {
        (path.replace("{model}", "{model:path}"), method.upper())
        for path, item in describe(["m"])["paths"].items()
        for method in item
    }
    there = {(path, "POST") for path in FORWARDED}
    memory = Memory(Path, LimitSettings, Bodies(LimitSettings))
    routes = Operations(None).routes() + memory.routes()  # type: ignore[arg-type]
    for route in routes:
        there |= {(route.path, method) for method in (route.methods or ()) if method != "HEAD"}
    assert there == described | {("/openapi.json", "GET")}


@pytest.mark.parametrize(
    "request_line",
    [b"GET /v1/models/%ff%fe HTTP/1.1", b"POST /action/sleep/%00 HTTP/1.1",
     b"GET /health/..%2f..%2fetc HTTP/1.1", b"GET /traffic/stats?window=1e999 HTTP/1.1",
     b"GET /" + b"x" * 9000 + b" HTTP/1.1", b"BREW /v1/models HTTP/1.1", b"\xff\xfe HTTP/9"],
)  # fmt: skip
def test_what_no_schema_has(url: str, request_line: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request_line + b"\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(4096):
                answer += part
    assert answer.split(b" ")[1][:1] == b"4", answer[:200]
    assert get(f"{url}/health")["status"] == "healthy"
