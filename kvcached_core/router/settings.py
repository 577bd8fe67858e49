# SPDX-License-Identifier: Apache-2.0
"""What an operator writes in the router's YAML file. Times are seconds, or ``500ms``, ``5m``."""

from __future__ import annotations

import ipaddress
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from ..cli.values import parse_address, parse_duration
from ..config import Bytes, default_ledger_dir
from ..units import format_size
from .keys import KeySource

Seconds = Annotated[float, BeforeValidator(lambda value: parse_duration(str(value)))]
Positive = Annotated[Seconds, Field(gt=0)]


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    try:
        # Also what only a connection would find wrong with it.
        good = parts.port != 0 and parts.hostname and parts.hostname.encode("idna")
        httpx.URL(text)
    except (ValueError, httpx.InvalidURL):
        good = False
    if parts.scheme not in ("http", "https") or not good:
        raise ValueError(f"{text!r} is not the URL of an engine: write e.g. http://127.0.0.1:8000")
    if parts.query or parts.fragment or parts.username:
        raise ValueError(f"{text!r} has more than scheme, host, port and path: leave that out")
    return text.rstrip("/").removesuffix("/v1")


def _word(value: object) -> object:
    """YAML's numbers and truths as they are written in an environment or a command."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _words(value: object) -> object:
    if isinstance(value, str):
        return tuple(shlex.split(value))
    return tuple(map(_word, value)) if isinstance(value, list) else value


def _port(value: object) -> int:
    is_port = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16
    return int(str(value)) if is_port else 1


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MisplacedError(ValueError):
    """What is wrong with a part that only the whole can tell."""

    def __init__(self, location: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.location = location


class ListenSettings(_Settings):
    """Where the router is reached."""

    address: str = "127.0.0.1"
    port: int = 8080
    allow_anonymous: bool = False
    """Listen on other addresses than the loopback ones although no API keys are configured."""

    @property
    def is_loopback(self) -> bool:
        if self.address == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            return False


class LimitSettings(_Settings):
    """Bounds of every request."""

    body: Bytes = Field(default=32 << 20, gt=0)
    """Most bytes of a request's body."""
    bodies: Bytes = Field(default=1 << 30, gt=0)
    """Most bytes of the bodies of all requests that are there; more are refused with status 503."""
    body_time: Positive = 30.0
    """For the client to send the body."""
    request_time: Positive = 1800.0
    """From the body's end to the answer's, waiting included."""
    stall_time: Positive = 300.0
    """How long an answer that has begun may pause, or the client not read it."""
    connect_time: Positive = 5.0
    """For a connection to an engine."""
    drain_time: Positive = 30.0
    """For requests in flight when the router is told to stop."""

    @model_validator(mode="after")
    def _one_fits(self) -> LimitSettings:
        if self.bodies < self.body:
            raise ValueError(
                f"'bodies', for all requests together, has {format_size(self.bodies)}, less than "
                f"{format_size(self.body)} for one ('body'): raise 'bodies' or lower 'body'"
            )
        return self


class HealthSettings(_Settings):
    """How replicas are probed."""

    interval: Positive = 5.0
    timeout: Positive = 3.0
    failures: int = Field(default=2, ge=1)
    """Probes or requests in a row that fail before a replica is left out."""


class GpuSettings(_Settings):
    """The queue of requests in front of a GPU, of all models on it."""

    max_running: int = Field(default=256, ge=1)
    """Requests that its engines have at a time; the others wait here."""
    order: Literal["slack", "fifo"] = "slack"
    """``slack``: so that the most requests meet their objective. ``fifo``: as they came."""
    device: Annotated[str, BeforeValidator(_word)] | None = None
    """What engines that are launched here see: ``CUDA_VISIBLE_DEVICES``."""
    mps: bool | Literal["auto"] = "auto"
    """Launch engines as clients of MPS; ``auto``: where it can run."""
    parallel_starts: int = Field(default=1, ge=1)
    """Engines that are launched at a time; the others wait until those are ready."""


class RestartSettings(_Settings):
    """When an engine that ended by itself is started again."""

    delay: Positive = 1.0
    """After its first end; doubled after each further one."""
    longest: Positive = 60.0
    """The delay grows no further."""
    healthy: Positive = 60.0
    """An engine that was ready for so long begins with the first delay again."""


class LaunchSettings(_Settings):
    """How the router starts an engine. In words, ``{port}`` and ``{name}`` are filled in."""

    port: int = Field(ge=1, le=65535)
    """On which it shall listen, on 127.0.0.1."""
    model: str | None = None
    """Folder or name of a model; the router makes the command."""
    command: Words | None = None
    """The whole command instead."""
    python: str = sys.executable
    """With ``model``: the interpreter of the environment that the engine is installed in."""
    args: Words = ()
    """With ``model``: further arguments."""
    env: dict[str, Annotated[str, BeforeValidator(_word)]] = {}
    """On top of the router's own environment."""
    folder: Path | None = None
    """Where it runs; by default where the router does."""
    log: Path | None = None
    """A file that its output is appended to; by default it goes where the router's goes."""
    start_time: Positive = 600.0
    """For it to be healthy after its start."""
    stop_time: Positive = 30.0
    """For it to end after SIGTERM, before it is killed."""
    hang_time: Positive = 120.0
    """Once ready, it is started again after it was not healthy for so long."""
    restart: RestartSettings = RestartSettings()

    @model_validator(mode="after")
    def _one(self) -> LaunchSettings:
        if (self.model is None) == (self.command is None):
            raise ValueError("write exactly one of 'model' and 'command'")
        if self.command is not None and (self.args or not self.command):
            raise ValueError("'command' is the whole command: write the arguments there")
        return self


class ReplicaSettings(_Settings):
    """One engine, which runs already (``url``), or which the router runs (``launch``)."""

    url: Annotated[str, AfterValidator(_base_url)]
    engine: Literal["vllm", "sglang"] = "vllm"
    """Whose endpoints put it to sleep and wake it."""
    gpu: str | None = None
    """Which of ``gpus`` it shares with others; by default it has a queue of its own."""
    key: KeySource | None = None
    """The API key that this engine wants, from ``env`` or ``file``."""
    launch: LaunchSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _launched(cls, value: Any) -> Any:
        launch = value.get("launch") if isinstance(value, dict) else None
        if not isinstance(launch, dict):
            return value
        if "url" in value:
            raise ValueError("an engine that is launched has the URL of its port: leave 'url' out")
        # Without one, what is said of 'launch' tells of it.
        return {**value, "url": f"http://127.0.0.1:{_port(launch.get('port'))}"}

    @field_validator("gpu", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("key")
    @classmethod
    def _plain(cls, value: KeySource | None) -> KeySource | None:
        if value is not None and value.sha256 is not None:
            raise ValueError("a hash cannot be sent to an engine: give the key by 'env' or 'file'")
        return value


class QueueSettings(_Settings):
    """Requests that wait for a model to wake or for a GPU."""

    max_waiting: int = Field(default=512, ge=0)
    """More are refused with status 503."""
    timeout: Positive = 60.0
    """After this the request is refused with status 503."""


class SleepSettings(_Settings):
    """When and how a model sleeps."""

    kind: Literal["engine", "cold"] = "engine"
    """``engine``: its engines' own sleep mode. ``cold``: they end, and are launched again."""
    at_start: bool = False
    """It sleeps until the first request, once its engines have been launched."""
    after: Positive | None = None
    """Without a request for so long; by default only when told to."""
    yields_after: Annotated[Seconds, Field(ge=0)] = 1.0
    """With ``after``: it sleeps sooner, idle for so long, if another one waits for room to wake."""
    minimum: Annotated[Seconds, Field(ge=0)] = 0.0
    """It is not woken by a request sooner than this after it was put to sleep."""
    level: Literal[1, 2] = 1
    """vLLM: 1 keeps the weights in host memory, 2 drops them."""
    timeout: Positive = 120.0
    """For an engine to sleep or to wake."""
    retry: Positive = 5.0
    """After a wake that failed, requests are refused for so long before it is tried again."""


class ModelSettings(_Settings):
    """What clients name as ``model``."""

    name: str = Field(min_length=1)
    replicas: list[ReplicaSettings] = Field(min_length=1)
    routing: Literal["least-loaded", "prefix"] = "least-loaded"
    """``prefix``: prompts that begin alike go to the same replica while its load allows."""
    prefix_bytes: int = Field(default=1024, ge=16)
    """How much of a prompt's beginning decides that."""
    ttft: Positive | None = None
    """Objective for the time to the first token; by default the queue's timeout."""
    prefill_rate: float = Field(default=20_000.0, gt=0)
    """Prompt tokens a second that an engine reads; only the order in the queue depends on it."""
    retries: int = Field(default=2, ge=0)
    """Further attempts, on other replicas if there are any, while nothing was answered."""
    queue: QueueSettings = QueueSettings()
    sleep: SleepSettings = SleepSettings()

    @model_validator(mode="after")
    def _has_engines_to_start(self) -> ModelSettings:
        if self.sleep.kind == "cold" or self.sleep.at_start:
            what = "kind: cold" if self.sleep.kind == "cold" else "at_start"
            for index, replica in enumerate(self.replicas):
                if replica.launch is None:
                    raise ValueError(
                        f"sleep has {what!r}, which is for engines that the router runs, and "
                        f"replicas[{index}] is not: give it 'launch' instead of 'url'"
                    )
        return self


class RouterSettings(_Settings):
    """The whole file."""

    listen: ListenSettings = ListenSettings()
    keys: list[KeySource] = []
    """API keys of clients; with none, everybody who reaches the router may use it."""
    admin_keys: list[KeySource] = []
    """Keys for ``/action``, ``/admin`` and everything else; with none, ``keys`` may do that too."""
    limits: LimitSettings = LimitSettings()
    health: HealthSettings = HealthSettings()
    gpus: dict[str, GpuSettings] = {}
    ledger_dir: Path = Field(default_factory=default_ledger_dir)
    """Of the engines' memory, for the web page: their ``KVCACHED_LEDGER_DIR``."""
    models: list[ModelSettings] = Field(min_length=1)

    @field_validator("listen", mode="before")
    @classmethod
    def _listen(cls, value: object) -> object:
        if isinstance(value, str | int) and not isinstance(value, bool):
            address, port = parse_address(str(value))
            return {"address": address, "port": port}
        return value

    @model_validator(mode="after")
    def _reachable(self) -> RouterSettings:
        if not (self.listen.is_loopback or self.listen.allow_anonymous or self.keys):
            raise MisplacedError(
                ("listen",),
                f"{self.listen.address} is reached from other machines, and there are no API keys: "
                "add 'keys', listen on 127.0.0.1, or set 'allow_anonymous: true' in 'listen'",
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RouterSettings:
        names: set[str] = set()
        ports: set[int] = set()
        for i, model in enumerate(self.models):
            if model.name in names:
                raise MisplacedError(
                    ("models", i, "name"),
                    f"there is a model {model.name!r} already: put all its replicas there",
                )
            names.add(model.name)
            urls: set[str] = set()
            for j, replica in enumerate(model.replicas):
                where = ("models", i, "replicas", j)
                if replica.url in urls:
                    raise MisplacedError(
                        (*where, "url"), f"{replica.url} is a replica already: remove one"
                    )
                urls.add(replica.url)
                if replica.launch is not None:
                    port = replica.launch.port
                    if port in ports or port == self.listen.port:
                        raise MisplacedError(
                            (*where, "launch", "port"),
                            f"port {port} is in use by this file already: name another one",
                        )
                    ports.add(port)
                if replica.gpu is not None and replica.gpu not in self.gpus:
                    known = ", ".join(sorted(self.gpus)) or "none"
                    raise MisplacedError(
                        (*where, "gpu"),
                        f"there is no GPU {replica.gpu!r} in 'gpus' ({known}): add it there",
                    )
        return self
