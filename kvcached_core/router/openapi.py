# SPDX-License-Identifier: Apache-2.0
"""The router's own description of its endpoints, as OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .memory import Order
from .traffic import LONGEST_WINDOW_S

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_TEXT = {"type": "string"}
_PROMPT = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT},
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
    ]
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": _TEXT, "content": _TEXT},
}
_FORWARDED: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/completions": ("Complete a prompt", {"prompt": _PROMPT}),
    "/v1/chat/completions": (
        "Answer a conversation",
        {"messages": {"type": "array", "minItems": 1, "items": _MESSAGE}},
    ),
    "/v1/embeddings": ("Vectors of texts", {"input": _PROMPT}),
}
_WINDOW = {
    "name": "window",
    "in": "query",
    "description": "seconds over which rates are taken",
    "schema": {"type": "number", "minimum": 1, "maximum": LONGEST_WINDOW_S},
}
_THRESHOLD = {
    "name": "threshold",
    "in": "query",
    "description": "seconds without a request",
    "schema": {"type": "number", "minimum": 0},
}
_GET: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "/health": ("That the router answers", []),
    "/health/all": ("Health of all models", []),
    "/health/{model}": ("Health of a model; 503 if it cannot serve", []),
    "/get_server_info": ("Uptime and reloads", []),
    "/models": ("Models with their states", []),
    "/models/idle": ("Models without a request for longer", [_THRESHOLD]),
    "/models/active": ("The others, with their rates", [_THRESHOLD, _WINDOW]),
    "/traffic/stats": ("Requests of all models", [_WINDOW]),
    "/traffic/stats/{model}": ("Requests of a model", [_WINDOW]),
    "/sleep/status": ("Who sleeps", []),
    "/sleep/candidates": ("Who could sleep", []),
    "/state": ("Models with their engines, and queues", []),
    "/memory": ("What engines hold of their devices' memory", []),
    "/v1/models": ("Models as OpenAI lists them", []),
    "/v1/models/{model}": ("One model", []),
}
_POST = {
    "/action/sleep/{model}": "Put a model to sleep; 409 if it has requests",
    "/action/wakeup/{model}": "Wake a model; 503 if it does not wake",
    "/admin/reload": "Read the configuration again",
}


def describe(models: Sequence[str]) -> dict[str, Any]:
    """The document.

    Args:
        models: names of the models there are.
    """
    name = {"type": "string", "enum": list(models)}
    paths: dict[str, dict[str, Any]] = {}
    for path, (summary, properties) in _FORWARDED.items():
        paths[path] = {"post": _forwarded(summary, properties, name)}
    for path, (summary, query) in _GET.items():
        paths[path] = {"get": _operation(path, summary, query, name)}
    for path, summary in _POST.items():
        paths[path] = {"post": _operation(path, summary, [], name)}
    paths["/action/memory"] = {"post": _order()}
    text = {"200": {"description": "series", "content": {"text/plain": {"schema": _TEXT}}}}
    paths["/metrics"] = {"get": {"summary": "Series for Prometheus", "responses": text}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvcached-router", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # Without keys in the configuration, none is needed.
        "security": [{}, {"key": []}],
    }


def _forwarded(summary: str, properties: dict[str, Any], name: dict[str, Any]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": ["model", *properties],
        "properties": {
            "model": name,
            "stream": {"type": "boolean"},
            **properties,
            "max_tokens": {"type": "integer", "minimum": 1},
        },
    }
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    answers: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    good = {"description": "the engine's answer, as it came", "content": answers}
    responses = {"200": good, "default": _failure()}
    return {"summary": summary, "requestBody": body, "responses": responses}


def _order() -> dict[str, Any]:
    schema = Order.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    good = {"description": "done", "content": {"application/json": {"schema": {"type": "object"}}}}
    summary = "Have a member hold less, or at most so much; 409 if it is refused"
    responses = {"200": good, "default": _failure()}
    return {"summary": summary, "requestBody": body, "responses": responses}


def _operation(
    path: str, summary: str, query: list[dict[str, Any]], name: dict[str, Any]
) -> dict[str, Any]:
    parameters = list(query)
    if "{model}" in path:
        parameters.append({"name": "model", "in": "path", "required": True, "schema": name})
    good = {"description": "done", "content": {"application/json": {"schema": {"type": "object"}}}}
    responses = {"200": good, "default": _failure()}
    return {"summary": summary, "parameters": parameters, "responses": responses}


def _failure() -> dict[str, Any]:
    # An engine's own errors come as it sends them, so their form is not promised.
    return {"description": "why not", "content": {"application/json": {}}}
