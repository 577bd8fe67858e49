# SPDX-License-Identifier: Apache-2.0
"""Headers that pass through the router, and those that do not."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

RequestId = str
RawHeaders = list[tuple[bytes, bytes]]

REQUEST_ID = b"x-request-id"
_PLAIN_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Of one connection only (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# The client's key is for the router: an engine has one of its own.
_NOT_SENT = _HOP_BY_HOP | {
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
    REQUEST_ID,
}
_NOT_RETURNED = _HOP_BY_HOP | {b"date", b"server", REQUEST_ID}


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> RequestId:
    """The client's, if it sent one that is safe to repeat; else a new one."""
    given = find(headers, REQUEST_ID)
    if given is not None and _PLAIN_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The first value of a header."""
    for key, value in headers:
        if key.lower() == name:
            return value.decode("latin-1")
    return None


def to_engine(headers: Iterable[tuple[bytes, bytes]], identity: RequestId) -> RawHeaders:
    """What an engine gets of a client's headers."""
    kept = _without(headers, _NOT_SENT)
    # Or httpx would ask for compressed answers that the client may not understand.
    if all(name.lower() != b"accept-encoding" for name, _ in kept):
        kept.append((b"accept-encoding", b"identity"))
    return [*kept, (REQUEST_ID, identity.encode("ascii"))]


def to_client(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """What a client gets of an engine's headers."""
    return [(name.lower(), value) for name, value in _without(headers, _NOT_RETURNED)]


def _without(headers: Iterable[tuple[bytes, bytes]], names: frozenset[bytes]) -> RawHeaders:
    listed = list(headers)
    # Headers that the sender itself declares to be of this connection.
    named = {
        part.strip().lower()
        for name, value in listed
        if name.lower() == b"connection"
        for part in value.split(b",")
    }
    left_out = names | named
    return [(name, value) for name, value in listed if name.lower() not in left_out]


def as_text(raw: RawHeaders) -> list[tuple[str, str]]:
    """For aiohttp, which encodes them as UTF-8."""
    return [(name.decode("latin-1"), _text(value)) for name, value in raw]


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")
