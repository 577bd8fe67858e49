# SPDX-License-Identifier: Apache-2.0
"""The router as an ASGI application."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import page
from .errors import ApiError
from .front import Forward
from .headers import REQUEST_ID
from .memory import Memory
from .middleware import Authentication, RequestIds
from .operate import Operations
from .router import Router

log = logging.getLogger(__name__)
FORWARDED = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


def make_app(router: Router) -> Starlette:
    """Serves ``router``, which it starts and stops with itself."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await router.start()
        try:
            yield
        finally:
            await router.stop()

    forward = Forward(router)
    memory = Memory(
        lambda: router.settings.ledger_dir, lambda: router.settings.limits, router.bodies
    )
    return Starlette(
        routes=[
            *(Route(path, forward, methods=["POST"]) for path in FORWARDED),
            *Operations(router).routes(),
            *memory.routes(),
            *page.routes(),
        ],
        middleware=[Middleware(RequestIds), Middleware(Authentication, router=router)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _unforeseen,
        },
        lifespan=lifespan,
    )


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _response(ApiError(404, f"there is nothing at {request.url.path[:200]!r}"))
    response = _response(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this, so that the server logs it.
    response = _response(
        ApiError(500, "the router failed; its log says how", "internal_error", "internal_error")
    )
    # This is answered outside of what gives the others their id.
    response.headers[REQUEST_ID.decode()] = request.scope["state"]["request_id"]
    return response


def _response(error: ApiError) -> Response:
    raw = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers=raw)
