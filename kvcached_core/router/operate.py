# SPDX-License-Identifier: Apache-2.0
"""The endpoints for operators: health, traffic, sleep, metrics, reload.

Names and meanings are those of the public kvcached's controller, so that what was written for it
works here.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..config import ConfigError
from .errors import ApiError
from .metrics import CONTENT_TYPE
from .model import Model
from .openapi import describe
from .replica import Replica
from .router import Router
from .states import Busy, State
from .traffic import LONGEST_WINDOW_S

_WINDOW_S = 60.0
_THRESHOLD_S = 300.0


class Operations:
    """The handlers."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def routes(self) -> list[Route]:
        """Where they are. Names of models may have slashes, plain or as ``%2F``."""
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/health": self.health,
            "/health/all": self.all_health,
            "/health/{model:path}": self.model_health,
            "/get_server_info": self.server_info,
            "/metrics": self.metrics,
            "/state": self.state,
            "/openapi.json": self.openapi,
            "/models": self.models,
            "/models/idle": self.idle_models,
            "/models/active": self.active_models,
            "/traffic/stats": self.traffic,
            "/traffic/stats/{model:path}": self.model_traffic,
            "/sleep/status": self.sleep_status,
            "/sleep/candidates": self.sleep_candidates,
            "/v1/models": self.openai_models,
            "/v1/models/{model:path}": self.openai_model,
        }
        post: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/action/sleep/{model:path}": self.sleep,
            "/action/wakeup/{model:path}": self.wake,
            "/admin/reload": self.reload,
        }
        return [
            *(Route(path, handler, methods=["GET"]) for path, handler in get.items()),
            *(Route(path, handler, methods=["POST"]) for path, handler in post.items()),
        ]

    # -- health -----------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """That the router itself answers."""
        return JSONResponse({"status": "healthy"})

    async def all_health(self, _: Request) -> Response:
        health = {model.name: _health(model) for model in self._models()}
        return JSONResponse({"models": health})

    async def model_health(self, request: Request) -> Response:
        """503 if no replica could serve a request, asleep or not."""
        model = self._model(request)
        health = _health(model)
        status = 200 if health["healthy"] else 503
        return JSONResponse({"model": model.name, "health": health}, status)

    async def server_info(self, _: Request) -> Response:
        router = self._router
        info = {
            "status": "running",
            "uptime_seconds": time.time() - router.started_at,
            "models": len(router.models),
            "reloads": router.reloads,
        }
        return JSONResponse(info)

    async def state(self, _: Request) -> Response:
        """What the web page shows beside memory."""
        router = self._router
        queues = [
            {
                "name": gate.name,
                "order": gate.settings.order,
                "max_running": gate.settings.max_running,
                "running": gate.running,
                "waiting": gate.waiting,
            }
            for gate in router.gates
        ]
        answer = {
            "uptime_seconds": time.time() - router.started_at,
            "models": [_state(model) for model in self._models()],
            "queues": queues,
        }
        return JSONResponse(answer)

    async def metrics(self, _: Request) -> Response:
        return Response(self._router.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(describe(list(self._router.models)))

    # -- models -----------------------------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        return JSONResponse({"models": {model.name: _describe(model) for model in self._models()}})

    async def openai_models(self, _: Request) -> Response:
        data = [_card(model) for model in self._models()]
        return JSONResponse({"object": "list", "data": data})

    async def openai_model(self, request: Request) -> Response:
        return JSONResponse(_card(self._model(request)))

    async def idle_models(self, request: Request) -> Response:
        """Those without a request for longer than ``threshold`` seconds."""
        threshold = _number(request, "threshold", _THRESHOLD_S)
        idle = [model for model in self._models() if model.traffic.idle_s > threshold]
        details = {
            model.name: {
                "idle_time_seconds": model.traffic.idle_s,
                "total_requests": model.traffic.total,
                "last_activity_time": model.traffic.last_activity,
            }
            for model in idle
        }
        answer = {
            "idle_models": list(details),
            "idle_threshold_seconds": threshold,
            "idle_model_details": details,
            "idle_models_count": len(details),
        }
        return JSONResponse(answer)

    async def active_models(self, request: Request) -> Response:
        """The others, with their rates over the last ``window`` seconds."""
        threshold = _number(request, "threshold", _THRESHOLD_S)
        window = _window(request)
        active = [model for model in self._models() if model.traffic.idle_s <= threshold]
        details = {
            model.name: {
                "request_rate": model.traffic.rate(window),
                "total_requests": model.traffic.total,
                "avg_response_time": model.traffic.mean_answer_s,
                "last_activity_time": model.traffic.last_activity,
            }
            for model in active
        }
        answer = {
            "active_models": list(details),
            "idle_threshold_seconds": threshold,
            "window_seconds": window,
            "active_model_details": details,
            "active_models_count": len(details),
        }
        return JSONResponse(answer)

    # -- traffic ----------------------------------------------------------------------------------

    async def traffic(self, request: Request) -> Response:
        window = _window(request)
        stats = {model.name: _stats(model, window) for model in self._models()}
        return JSONResponse({"traffic_stats": stats, "window_seconds": window})

    async def model_traffic(self, request: Request) -> Response:
        model = self._model(request)
        window = _window(request)
        stats = {"model_name": model.name, **_stats(model, window)}
        return JSONResponse({"model_stats": stats, "window_seconds": window})

    # -- sleep ------------------------------------------------------------------------------------

    async def sleep_status(self, _: Request) -> Response:
        now = time.time()
        sleeping = {
            model.name: {
                "sleep_start_time": model.slept_at,
                "sleep_duration": now - model.slept_at,
                "manual_sleep": model.slept_by_hand,
            }
            for model in self._models()
            if model.slept_at is not None
        }
        answer = {
            "sleeping_models": sleeping,
            "sleep_candidates": [model.name for model in self._candidates()],
            **self._sleep_settings(),
            "wakeup_on_request": True,
            "states": {model.name: model.state.value for model in self._models()},
        }
        return JSONResponse(answer)

    async def sleep_candidates(self, _: Request) -> Response:
        details = {
            model.name: {
                "idle_time_seconds": model.traffic.idle_s,
                "total_requests": model.traffic.total,
                "last_activity_time": model.traffic.last_activity,
                "can_sleep": model.pending == 0,
            }
            for model in self._candidates()
        }
        answer = {
            "sleep_candidates": list(details),
            "candidate_details": details,
            **self._sleep_settings(),
        }
        return JSONResponse(answer)

    async def sleep(self, request: Request) -> Response:
        """409 if it has requests: it is never put to sleep under them."""
        model = self._model(request)
        try:
            await model.sleep(by_hand=True)
        except Busy as error:
            return _outcome(model, False, str(error), 409)
        return _outcome(model, True, f"{model.name} is asleep", 200)

    async def wake(self, request: Request) -> Response:
        """503 if it does not wake, or its engines crash as they start."""
        model = self._model(request)
        limit = self._router.settings.limits.request_time
        try:
            with anyio.fail_after(limit):
                await model.wake()
        except ApiError as error:
            response = _outcome(model, False, error.message, error.status)
            response.headers.update(
                {name.decode(): value.decode() for name, value in error.headers}
            )
            return response
        except TimeoutError:
            said = f"{model.name} was not active within {limit:g} s; it is waited for no longer"
            return _outcome(model, False, said, 504)
        return _outcome(model, True, f"{model.name} is active", 200)

    async def reload(self, _: Request) -> Response:
        """Read the configuration again; 400 with the mistakes if it is wrong."""
        try:
            self._router.reload()
        except ConfigError as error:
            raise ApiError(400, str(error), code="bad_config") from None
        return JSONResponse({"success": True, "reloads": self._router.reloads})

    # -- common -----------------------------------------------------------------------------------

    def _models(self) -> list[Model]:
        return list(self._router.models.values())

    def _model(self, request: Request) -> Model:
        return self._router.model(str(request.path_params["model"]))

    def _candidates(self) -> list[Model]:
        found = []
        for model in self._models():
            after = model.settings.sleep.after or _THRESHOLD_S
            if model.state is State.ACTIVE and model.traffic.idle_s > after:
                found.append(model)
        return found

    def _sleep_settings(self) -> dict[str, Any]:
        afters = [model.settings.sleep.after for model in self._models()]
        enabled = [after for after in afters if after is not None]
        return {
            "auto_sleep_enabled": bool(enabled),
            "idle_threshold_seconds": min(enabled, default=_THRESHOLD_S),
        }


def _health(model: Model) -> dict[str, Any]:
    return {
        "healthy": any(replica.usable for replica in model.replicas),
        "state": model.state.value,
        "problem": model.problem,
        "replicas": [_replica_health(replica) for replica in model.replicas],
    }


def _replica_health(replica: Replica) -> dict[str, Any]:
    health = {
        "url": replica.name,
        "healthy": replica.healthy,
        "asleep": replica.asleep,
        "requests": replica.load,
        "problem": replica.problem,
    }
    supervisor = replica.supervisor
    if supervisor is not None:
        process = supervisor.process
        runs = process is not None and process.runs
        health["process"] = {
            "phase": supervisor.phase.value,
            "pid": process.pid if process is not None and runs else None,
            "starts": supervisor.starts,
            "crashes": supervisor.crashes,
        }
    return health


def _state(model: Model) -> dict[str, Any]:
    return _health(model) | {
        "name": model.name,
        "pending": model.pending,
        "waiting": model.waiting,
        "rate": model.traffic.rate(_WINDOW_S),
        "idle": model.traffic.idle_s,
    }


def _describe(model: Model) -> dict[str, Any]:
    first = urlsplit(model.replicas[0].name)
    return {
        "endpoint": {"host": first.hostname, "port": first.port},
        "replicas": [replica.name for replica in model.replicas],
        "state": model.state.value,
        "pending_requests": model.pending,
        "waiting_requests": model.waiting,
    }


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "kvcached",
    }


def _stats(model: Model, window: float) -> dict[str, Any]:
    traffic = model.traffic
    return {
        "total_requests": traffic.total,
        "successful_requests": traffic.successful,
        "failed_requests": traffic.failed,
        "request_rate": traffic.rate(window),
        "avg_response_time": traffic.mean_answer_s,
        "last_activity_time": traffic.last_activity,
        "idle_time_seconds": traffic.idle_s,
        "is_idle": traffic.idle_s > (model.settings.sleep.after or _THRESHOLD_S),
    }


def _outcome(model: Model, success: bool, message: str, status: int) -> Response:
    answer = {"model_name": model.name, "success": success, "message": message}
    return JSONResponse(answer, status)


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ApiError(400, f"{name}={text[:40]!r} is not a number of seconds", param=name)
    return value


def _window(request: Request) -> float:
    window = _number(request, "window", _WINDOW_S)
    if not 1 <= window <= LONGEST_WINDOW_S:
        raise ApiError(400, f"window must be 1 to {LONGEST_WINDOW_S} seconds", param="window")
    return window
