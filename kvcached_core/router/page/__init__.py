# SPDX-License-Identifier: Apache-2.0
"""The web page: a few files, served as they are. Its data come from the other endpoints."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PATHS = frozenset(_FILES)
_HEADERS = {
    # Nothing from elsewhere, and nobody else's frame around the buttons.
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """Where they are."""
    return [Route(path, _serve, methods=["GET"]) for path in _FILES]


async def _serve(request: Request) -> Response:
    name, kind = _FILES[request.url.path]
    body = (Path(__file__).parent / name).read_bytes()
    return Response(body, headers=_HEADERS, media_type=kind)
