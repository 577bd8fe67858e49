# SPDX-License-Identifier: Apache-2.0
"""What the router must know of a request's body: its model, how it begins, how long it is."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .errors import ApiError

_BYTES_PER_TOKEN = 4
"""Of text, roughly; only the order in the queue depends on it."""
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Prompt:
    """A body, unchanged, and what was read from it."""

    body: bytes
    model: str
    content: Any
    """The prompt, the messages or the input; of a reduced one the bytes that it begins with."""
    tokens: int
    """Roughly how long it is."""

    def prefix(self, num_bytes: int) -> bytes:
        """The first bytes of the prompt in a form that equal beginnings have in common."""
        taken = bytearray()
        with contextlib.suppress(RecursionError):  # what was taken until then will do
            for piece in _pieces(self.content, num_bytes, _Left()):
                taken += piece
                if len(taken) >= num_bytes:
                    break
        return bytes(taken[:num_bytes])

    def reduced(self, num_bytes: int) -> Prompt:
        """The same without the content, but for the prefix: as objects it takes many times more."""
        return replace(self, content=self.prefix(num_bytes))


def parse(body: bytes) -> Prompt:
    """Read a request's body.

    Raises:
        ApiError: it is no JSON object, or names no model (status 400).
    """
    try:
        with _no_collections():
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
        left = _Left()
        tokens = _tokens(content, left)
    except RecursionError:
        raise ApiError(400, "the prompt is nested too deeply: send text or messages") from None
    if left.parts <= 0:
        tokens = max(tokens, len(body) // _BYTES_PER_TOKEN)
    return Prompt(body, model, content, tokens)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    # All requests wait for this, and the collector, which looks at the same millions of new objects
    # again and again, makes five seconds of one for a hostile body.
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass(slots=True)
class _Left:
    """Parts of a prompt that may still be looked at."""

    parts: int = 10_000


def _tokens(content: Any, left: _Left, depth: int = 0) -> int:
    if depth > _DEEPEST:
        raise RecursionError
    left.parts -= 1
    if isinstance(content, str):
        return 1 + len(content) // _BYTES_PER_TOKEN
    if isinstance(content, list):
        if content and isinstance(content[0], int):
            return len(content)
        found = 0
        for item in content:
            if left.parts <= 0:
                break
            found += _tokens(item, left, depth + 1)
        return found
    if isinstance(content, dict):
        # Not the data of images: that says nothing of their tokens.
        return sum(_tokens(content.get(name), left, depth + 1) for name in ("content", "text"))
    return 0


def _pieces(content: Any, num_bytes: int, left: _Left) -> Iterator[bytes]:
    left.parts -= 1
    if isinstance(content, str):
        yield content[:num_bytes].encode("utf-8", "surrogatepass")
    elif isinstance(content, bytes):  # no JSON: of a reduced prompt
        yield content
    elif isinstance(content, list):
        for item in content:
            if left.parts <= 0:
                return
            yield from _pieces(item, num_bytes, left)
    elif isinstance(content, dict):
        for name, value in content.items():
            if left.parts <= 0:
                return
            yield str(name).encode("utf-8", "surrogatepass") + b"\0"
            yield from _pieces(value, num_bytes, left)
    else:
        yield json.dumps(content).encode() + b"\0"
