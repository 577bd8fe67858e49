# SPDX-License-Identifier: Apache-2.0
"""Reading a request's body within bounds of size and time, its own and those of all together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import anyio
from starlette.types import Receive, Scope

from ..units import format_size
from . import headers
from .errors import ApiError, unavailable
from .settings import LimitSettings

_RETRY_S = 5.0


class Disconnected(Exception):
    """The client went away."""


class Bodies:
    """What the bodies of all requests that are there take.

    Which model a request is for is in its body, and how many of them may wait is the model's
    matter: so many large ones could fill the memory before any queue's bound is looked at, and the
    queues of many models together.
    """

    def __init__(self, limits: Callable[[], LimitSettings]) -> None:
        self._limits = limits
        self.held = 0
        """Bytes."""

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """One request's part, which is given up with the end of the ``with`` block."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held

    def require(self, num_bytes: int) -> None:
        """Refuse what would not fit beside the others.

        Raises:
            ApiError: status 503.
        """
        limit = self._limits().bodies
        if self.held + num_bytes > limit:
            raise unavailable(
                f"the requests that are there have {format_size(self.held)}, of at most "
                f"{format_size(limit)}: ask again later",
                "bodies_full",
                _RETRY_S,
            )


class Share:
    """What one request has of :class:`Bodies`."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.held = 0
        """Bytes."""

    def expect(self, num_bytes: int) -> None:
        """Refuse at once what is announced and would not fit; nothing is set aside for it."""
        self._bodies.require(num_bytes)

    def add(self, num_bytes: int) -> None:
        """Count bytes that came.

        Raises:
            ApiError: all together are too many (status 503).
        """
        self._bodies.require(num_bytes)
        self._bodies.held += num_bytes
        self.held += num_bytes


async def read_body(scope: Scope, receive: Receive, limits: LimitSettings, share: Share) -> bytes:
    """The whole body, which counts against ``share`` as it comes.

    Raises:
        ApiError: it is too long (status 413), too slow (408), or too much with others' (503).
        Disconnected: the client left before it was complete.
    """
    announced = headers.find(scope["headers"], b"content-length")
    if announced is not None and announced.isdecimal():
        if int(announced) > limits.body:
            raise _too_long(limits)
        share.expect(int(announced))
    body = bytearray()
    with anyio.move_on_after(limits.body_time):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            if len(body) + len(part) > limits.body:
                raise _too_long(limits)
            share.add(len(part))
            body += part
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
