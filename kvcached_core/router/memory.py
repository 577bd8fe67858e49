# SPDX-License-Identifier: Apache-2.0
"""What engines hold of their devices' memory, and changing that: what ``kvctl`` does, by HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import _core
from ..cli import as_json
from ..cli.acknowledge import require, wait
from ..cli.errors import CtlError
from ..cli.frames import Ledgers
from ..cli.policy import SIZES, change, trim
from ..cli.select import pick
from ..units import Amount
from .body import Bodies, Disconnected, read_body
from .errors import ApiError
from .settings import LimitSettings

_BODY = 4096
_ACKNOWLEDGE_S = 10.0


class Order(BaseModel):
    """What a member is to do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ledger: str
    """Its key: ``gpu-…`` or ``host-…``."""
    member: str
    """Name, or ``#3`` for a slot."""
    do: Literal["limit", "guarantee", "cache_limit", "weight", "priority", "trim", "trim_cached"]
    value: str = Field(default="", max_length=40)
    """Bytes, ``2GiB``, ``25%`` or ``none``; a number for weight and priority."""


class Memory:
    """The handlers. Ledgers are files that are read in threads, one at a time."""

    def __init__(
        self, directory: Callable[[], Path], limits: Callable[[], LimitSettings], bodies: Bodies
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._bodies = bodies
        self._lock = threading.Lock()
        self._ledgers: Ledgers | None = None

    def routes(self) -> list[Route]:
        """Where they are."""
        return [
            Route("/memory", self.show, methods=["GET"]),
            Route("/action/memory", self.act, methods=["POST"]),
        ]

    async def show(self, _: Request) -> Response:
        """All ledgers, as ``kvctl list --json`` has them."""
        return JSONResponse(await asyncio.to_thread(self._show))

    async def act(self, request: Request) -> Response:
        """Do what an :class:`Order` says, and wait until the member has complied."""
        limits = self._limits().model_copy(update={"body": _BODY})
        try:
            with self._bodies.share() as share:
                body = await read_body(request.scope, request.receive, limits, share)
        except Disconnected:
            return Response(status_code=400)  # which nobody reads
        try:
            order = Order.model_validate(json.loads(body))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the order"
            raise ApiError(400, f"{where}: {first['msg']}", param=where) from None
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not JSON: send one JSON object") from None
        try:
            said = await asyncio.to_thread(self._act, order)
        except CtlError as error:
            raise ApiError(409, str(error), code="refused") from None
        return JSONResponse({"success": True, "message": said})

    def _show(self) -> dict[str, Any]:
        with self._lock:
            ledgers = self._read()
            return as_json.ledgers(ledgers.directory, ledgers.frames())

    def _read(self) -> Ledgers:
        directory = self._directory()
        if self._ledgers is None or self._ledgers.directory != directory:
            self._ledgers = Ledgers(directory)
        return self._ledgers

    def _act(self, order: Order) -> str:
        # Of its own: it may wait for a member for seconds.
        ledgers = Ledgers(self._directory(), order.ledger)
        frames = ledgers.frames()
        if not frames:
            raise CtlError(f"there is no ledger {order.ledger!r}: GET /memory has them")
        targets = pick(frames, order.member)
        if order.do in ("trim", "trim_cached"):
            trims = trim(ledgers, targets, None, order.do == "trim_cached")
            requests = [entry.request for entry in trims]
            wait(ledgers, requests, _ACKNOWLEDGE_S)
            require(requests, order.do, _ACKNOWLEDGE_S)
            return "; ".join(entry.describe() for entry in trims)
        value = _value(order)
        changes = change(ledgers, targets, order.do, lambda target: value(target.frame.capacity))
        requests = [entry.request for entry in changes]
        wait(ledgers, requests, _ACKNOWLEDGE_S)
        require(requests, order.do, _ACKNOWLEDGE_S)
        return "; ".join(entry.describe() for entry in changes)


def _value(order: Order) -> Callable[[int], int | None]:
    try:
        if order.do not in SIZES:
            number = int(order.value)
            return lambda _: number
        amount = Amount.parse(order.value)
    except (ValueError, _core.VmmError) as error:
        raise ApiError(400, f"value: {error}", param="value") from None

    def resolve(capacity: int) -> int | None:
        found = amount.resolve(capacity)
        return 0 if found is None and order.do == "guarantee" else found

    return resolve
