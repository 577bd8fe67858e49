# SPDX-License-Identifier: Apache-2.0
"""What the router must know of a request's body: its model, how it begins, how long it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import ApiError

_BYTES_PER_TOKEN = 4
"""Of text, roughly; only the order in the queue depends on it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A body, unchanged, and what was read from it."""

    body: bytes
    model: str
    content: Any
    """The prompt, the messages or the input."""
    tokens: int
    """Roughly how long it is."""

    def prefix(self, num_bytes: int) -> bytes:
        """The first bytes of the prompt in a form that equal beginnings have in common."""
        taken = bytearray()
        with contextlib.suppress(RecursionError):  # what was taken until then will do
            for piece in _pieces(self.content, num_bytes):
                taken += piece
                if len(taken) >= num_bytes:
                    break
        return bytes(taken[:num_bytes])


def parse(body: bytes) -> Prompt:
    """Read a request's body.

    Raises:
        ApiError: it is no JSON object, or names no model (status 400).
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON: send one JSON object in UTF-8") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object: send {...}")
    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(
            400, "'model' is not the name of a model: GET /v1/models has them", param="model"
        )
    names = ("messages", "prompt", "input")
    content = next((data[name] for name in names if name in data), None)
    try:
        tokens = _tokens(content)
    except RecursionError:
        raise ApiError(400, "the prompt is nested too deeply: send text or messages") from None
    return Prompt(body, model, content, tokens)


def _tokens(content: Any) -> int:
    if isinstance(content, str):
        return 1 + len(content) // _BYTES_PER_TOKEN
    if isinstance(content, list):
        if all(isinstance(item, int) for item in content):
            return len(content)
        return sum(_tokens(item) for item in content)
    if isinstance(content, dict):
        # Not the data of images: that says nothing of their tokens.
        return sum(_tokens(content.get(name)) for name in ("content", "text"))
    return 0


def _pieces(content: Any, num_bytes: int) -> Iterator[bytes]:
    if isinstance(content, str):
        yield content[:num_bytes].encode("utf-8", "surrogatepass")
    elif isinstance(content, list):
        for item in content:
            yield from _pieces(item, num_bytes)
    elif isinstance(content, dict):
        for name, value in content.items():
            yield str(name).encode("utf-8", "surrogatepass") + b"\0"
            yield from _pieces(value, num_bytes)
    else:
        yield json.dumps(content).encode() + b"\0"
