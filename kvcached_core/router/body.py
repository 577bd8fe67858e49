# SPDX-License-Identifier: Apache-2.0
"""Reading a request's body within bounds of size and time."""

from __future__ import annotations

import anyio
from starlette.types import Receive, Scope

from ..units import format_size
from . import headers
from .errors import ApiError
from .settings import LimitSettings


class Disconnected(Exception):
    """The client went away."""


async def read_body(scope: Scope, receive: Receive, limits: LimitSettings) -> bytes:
    """The whole body.

    Raises:
        ApiError: it is too long (status 413) or too slow (408).
        Disconnected: the client left before it was complete.
    """
    announced = headers.find(scope["headers"], b"content-length")
    if announced is not None and announced.isdigit() and int(announced) > limits.body:
        raise _too_long(limits)
    body = bytearray()
    with anyio.move_on_after(limits.body_time):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > limits.body:
                raise _too_long(limits)
            if not message.get("more_body", False):
                return bytes(body)
    raise ApiError(
        408,
        f"the body was not complete after {limits.body_time:g} s: send it faster",
        code="body_timeout",
    )


def _too_long(limits: LimitSettings) -> ApiError:
    return ApiError(
        413, f"the body has more than {format_size(limits.body)}: send less", code="body_too_large"
    )
