# SPDX-License-Identifier: Apache-2.0
"""Traces of requests for OpenTelemetry; spans of nobody unless an exporter is configured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode

from ..config import ConfigError
from .headers import RawHeaders

_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# The tracer of the API, which asks for the provider only once there is one.
_tracer = trace.get_tracer("kvcached.router")


def configure(environ: Mapping[str, str]) -> Callable[[], None] | None:
    """Export spans if the environment says where; what ends that, or None.

    OpenTelemetry's own variables: an endpoint for OTLP over HTTP, or ``console`` as the exporter.

    Raises:
        ConfigError: an exporter is wanted and cannot be had.
    """
    wanted = environ.get(_EXPORTER, "").strip()
    if wanted in ("", "none") and (wanted or not any(environ.get(name) for name in _ENDPOINTS)):
        return None
    if wanted not in ("", "otlp", "console"):
        raise ConfigError(f"{_EXPORTER}={wanted!r} is not known: set it to otlp, console or none")
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import (
            BatchSpanProcessor,
            ConsoleSpanExporter,
            SpanExporter,
        )

        exporter: SpanExporter
        if wanted == "console":
            exporter = ConsoleSpanExporter()
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"traces are configured and {error.name} is not installed: pip install "
            "'kvcached-core[tracing]', or unset the OTEL_ variables"
        ) from None
    resource = Resource.create()
    if not environ.get("OTEL_SERVICE_NAME"):
        resource = resource.merge(Resource({"service.name": "kvcached-router"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown


@contextlib.contextmanager
def request(path: str, raw: RawHeaders, request_id: str) -> Iterator[Span]:
    """The span of a client's request, within the trace that its headers name."""
    carrier = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}
    attributes = {
        "http.request.method": "POST",
        "url.path": path,
        "kvcached.request_id": request_id,
    }
    with _tracer.start_as_current_span(
        f"POST {path}", propagate.extract(carrier), SpanKind.SERVER, attributes
    ) as span:
        yield span


@contextlib.contextmanager
def step(name: str, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int) -> Iterator[Span]:
    """A part of the present request, or a span of its own where there is none."""
    named = {f"kvcached.{key}": value for key, value in attributes.items()}
    with _tracer.start_as_current_span(name, kind=kind, attributes=named) as span:
        yield span


def answered(span: Span, status: int, *, complete: bool) -> None:
    """Note how a request ended."""
    span.set_attribute("http.response.status_code", status)
    if status >= 500 or not complete:
        span.set_status(StatusCode.ERROR, "" if complete else "not answered to its end")


def onward(raw: RawHeaders) -> RawHeaders:
    """The headers for an engine, which name the present span if there is one."""
    if not trace.get_current_span().is_recording():
        return raw
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    kept = [(name, value) for name, value in raw if name.lower().decode("latin-1") not in carrier]
    return kept + [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]
