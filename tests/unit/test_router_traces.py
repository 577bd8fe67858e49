# SPDX-License-Identifier: Apache-2.0
"""Traces of the router: real exports over OTLP to a collector of the test's."""

from __future__ import annotations

import contextlib
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kvcached_core.config import ConfigError
from kvcached_core.router import tracing
from tests.support.launched import REPO
from tests.support.waiting import LONG_S
from tests.unit.test_router_process import engine, get, models, router

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, Span]]]]:
    """Where to send spans, and those that came with the name of the service."""
    found: list[tuple[str, Span]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {a.key: a.value.string_value for a in part.resource.attributes}
                for scope in part.scope_spans:
                    found.extend((names["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()
    server.server_close()


def attributes(span: Span) -> dict[str, object]:
    kinds = ("string_value", "int_value")
    return {
        a.key: next(getattr(a.value, kind) for kind in kinds if a.value.HasField(kind))
        for a in span.attributes
    }


def test_a_request_is_one_trace_from_client_to_engine(tmp_path: Path) -> None:
    with collector() as (endpoint, found), engine(tmp_path, 0, 3) as (upstream, _):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
        with router(tmp_path, models(upstream), env) as (url, started):
            body = json.dumps({"model": "m", "prompt": "hi"}).encode()
            for name in ("/action/sleep/m", "/v1/completions"):
                request = urllib.request.Request(
                    url + name, body, {"traceparent": f"00-{TRACE}-{PARENT}-01"}
                )
                urllib.request.urlopen(request, timeout=LONG_S).read()
            # What is not sent yet is sent then.
            started.send_signal(signal.SIGTERM)
            assert started.wait(timeout=LONG_S) == 0
    assert {service for service, _ in found} == {"kvcached-router"}
    spans = {span.name: span for _, span in found}
    assert set(spans) == {"POST /v1/completions", "queue", "engine", "wake"}
    assert all(span.trace_id.hex() == TRACE for span in spans.values())
    whole = spans["POST /v1/completions"]
    assert whole.parent_span_id.hex() == PARENT
    assert spans["queue"].parent_span_id == spans["engine"].parent_span_id == whole.span_id
    assert spans["wake"].parent_span_id == spans["queue"].span_id
    said = attributes(whole)
    assert (said["http.response.status_code"], said["gen_ai.request.model"]) == (200, "m")
    assert attributes(spans["engine"])["kvcached.replica"] == upstream
    assert spans["queue"].end_time_unix_nano <= spans["engine"].start_time_unix_nano


def test_nothing_is_traced_unless_asked_for(tmp_path: Path) -> None:
    script = (
        "import sys, os\n"
        "from kvcached_core.router import tracing\n"
        "assert tracing.configure({}) is None\n"
        "assert tracing.configure({'OTEL_TRACES_EXPORTER': 'none',"
        " 'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://x'}) is None\n"
        "with tracing.request('/p', [(b'traceparent', b'00-1-2-01')], 'id') as span:\n"
        "    assert not span.is_recording()\n"
        "    assert tracing.onward([(b'traceparent', b'x')]) == [(b'traceparent', b'x')]\n"
        "assert not any(name.startswith('opentelemetry.sdk') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_not_known_or_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'zipkin' is not known: set it to otlp"):
        tracing.configure({"OTEL_TRACES_EXPORTER": "zipkin"})
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvcached-core\[tracing\]'"):
        tracing.configure({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})


def test_a_collector_that_is_away_costs_no_request(tmp_path: Path) -> None:
    with engine(tmp_path, 0, 3) as (upstream, _):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
        with router(tmp_path, models(upstream), env) as (url, _):
            body = json.dumps({"model": "m", "prompt": "hi"}).encode()
            begin = time.monotonic()
            for _ in range(30):
                assert get(f"{url}/v1/completions", body)["choices"]
            assert time.monotonic() - begin < 10
