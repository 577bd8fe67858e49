# SPDX-License-Identifier: Apache-2.0
"""What holds for every request: an id, and a key where keys are configured."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import headers, page
from .errors import ApiError
from .router import Router

OPEN = frozenset(("/health",)) | page.PATHS
"""For probes of load balancers, which have no key, and for the page that asks for one."""
_ADMIN = ("/action/", "/admin/")


class RequestIds:
    """Gives each request an id, ``scope["state"]["request_id"]``, and returns it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = headers.request_id(scope["headers"])
        scope.setdefault("state", {})["request_id"] = identity

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry = (headers.REQUEST_ID, identity.encode("ascii"))
                message = {**message, "headers": [*message.get("headers", ()), entry]}
            await send(message)

        await self._app(scope, receive, with_id)


class Authentication:
    """Lets those pass who have a key that is good for the path."""

    def __init__(self, app: ASGIApp, router: Router) -> None:
        self._app = app
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            error = self._foreign(scope) or self._refusal(scope)
            if error is not None:
                await _answer(send, error)
                return
        await self._app(scope, receive, send)

    def _foreign(self, scope: Scope) -> ApiError | None:
        """Refuse what a browser sends for somebody else's page, which may press no button here."""
        origin = headers.find(scope["headers"], b"origin")
        if origin is None or not scope["path"].startswith(_ADMIN):
            return None
        host = headers.find(scope["headers"], b"host") or ""
        same = origin.partition("://")[2] == host
        # A name of somebody else's can be made to lead here; where a key is needed that is no use.
        if same and (self._router.keys or _is_plain(host)):
            return None
        return ApiError(
            403,
            f"pages of {origin[:100]} may not do this without an API key",
            code="foreign_origin",
        )

    def _refusal(self, scope: Scope) -> ApiError | None:
        keys, admin_keys = self._router.keys, self._router.admin_keys
        is_admin = scope["path"].startswith(_ADMIN)
        needed = (admin_keys or keys) if is_admin else keys
        if not needed:
            return None
        presented = _presented(scope)
        if needed.accepts(presented) or admin_keys.accepts(presented):
            return None
        if keys.accepts(presented):
            return ApiError(
                403, "this key is no admin key: use one of 'admin_keys'", code="not_admin"
            )
        how = "send one as 'Authorization: Bearer KEY'"
        said = "this is not a known API key" if presented else "an API key is needed"
        return ApiError(401, f"{said}: {how}", "authentication_error", "invalid_api_key")


def _is_plain(host: str) -> bool:
    """Whether this is an address, or this machine's own name for itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _presented(scope: Scope) -> str | None:
    given = headers.find(scope["headers"], b"authorization")
    if given is not None:
        scheme, _, key = given.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None
    return headers.find(scope["headers"], b"x-api-key")


async def _answer(send: Send, error: ApiError) -> None:
    raw = [*error.headers, (b"content-length", b"%d" % len(error.body))]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": error.body})
