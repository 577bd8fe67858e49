# SPDX-License-Identifier: Apache-2.0
"""What an operator writes in the router's YAML file. Times are seconds, or ``500ms``, ``5m``."""

from __future__ import annotations

import difflib
import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ..cli.values import parse_address, parse_duration
from ..config import Bytes, ConfigError
from .document import Document, read
from .keys import Keys, KeySource, collect

Seconds = Annotated[float, BeforeValidator(lambda value: parse_duration(str(value)))]
Positive = Annotated[Seconds, Field(gt=0)]


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ValueError(f"{text!r} is not the URL of an engine: write e.g. http://127.0.0.1:8000")
    if parts.query or parts.fragment or parts.username:
        raise ValueError(f"{text!r} has more than scheme, host, port and path: leave that out")
    return text.rstrip("/").removesuffix("/v1")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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


class ReplicaSettings(_Settings):
    """One engine."""

    url: Annotated[str, AfterValidator(_base_url)]
    engine: Literal["vllm", "sglang"] = "vllm"
    """Whose endpoints put it to sleep and wake it."""
    gpu: str | None = None
    """Which of ``gpus`` it shares with others; by default it has a queue of its own."""
    key: KeySource | None = None
    """The API key that this engine wants, from ``env`` or ``file``."""

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
    """When a model sleeps."""

    after: Positive | None = None
    """Without a request for so long; by default only when told to."""
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
            raise _At(
                ("listen",),
                f"{self.listen.address} is reached from other machines, and there are no API keys: "
                "add 'keys', listen on 127.0.0.1, or set 'allow_anonymous: true' in 'listen'",
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RouterSettings:
        names: set[str] = set()
        for i, model in enumerate(self.models):
            if model.name in names:
                raise _At(
                    ("models", i, "name"),
                    f"there is a model {model.name!r} already: put all its replicas there",
                )
            names.add(model.name)
            urls: set[str] = set()
            for j, replica in enumerate(model.replicas):
                where = ("models", i, "replicas", j)
                if replica.url in urls:
                    raise _At((*where, "url"), f"{replica.url} is a replica already: remove one")
                urls.add(replica.url)
                if replica.gpu is not None and replica.gpu not in self.gpus:
                    known = ", ".join(sorted(self.gpus)) or "none"
                    raise _At(
                        (*where, "gpu"),
                        f"there is no GPU {replica.gpu!r} in 'gpus' ({known}): add it there",
                    )
        return self


class _At(ValueError):
    """What is wrong with a part that only the whole can tell."""

    def __init__(self, location: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.location = location


class Loaded(_Settings):
    """Settings, with the secrets that they name."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    path: Path
    settings: RouterSettings
    keys: Keys
    admin_keys: Keys
    engine_keys: dict[str, str]
    """By the URL of the replica."""


def load(path: Path) -> Loaded:
    """Read and validate the file, and the keys that it names.

    Raises:
        ConfigError: each mistake on a line of its own, beginning with ``file:line:column``.
    """
    document = read(path)
    try:
        settings = RouterSettings.model_validate({} if document.data is None else document.data)
    except ValidationError as error:
        raise ConfigError(_explain(document, error)) from None
    problems: list[str] = []
    keys = _keys(document, ("keys",), settings.keys, problems)
    admin_keys = _keys(document, ("admin_keys",), settings.admin_keys, problems)
    engine_keys = {}
    for i, model in enumerate(settings.models):
        for j, replica in enumerate(model.replicas):
            if replica.key is None:
                continue
            try:
                engine_keys[replica.url] = replica.key.read(path.parent)[0]
            except ConfigError as error:
                where = document.at(("models", i, "replicas", j, "key"))
                problems.append(f"{where}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return Loaded(
        path=path, settings=settings, keys=keys, admin_keys=admin_keys, engine_keys=engine_keys
    )


def _keys(
    document: Document,
    location: tuple[str, ...],
    sources: list[KeySource],
    problems: list[str],
) -> Keys:
    found = []
    for index, source in enumerate(sources):
        try:
            found.append(collect(source, document.path.parent))
        except ConfigError as error:
            problems.append(f"{document.at((*location, index))}: {error}")
    return Keys(frozenset().union(*found))


def _explain(document: Document, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location: tuple[str | int, ...] = problem["loc"]
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, _At):
            location = cause.location
        lines.append(_line(document, location, problem["type"], problem["msg"]))
    return "\n".join(lines)


def _line(document: Document, location: tuple[str | int, ...], kind: str, message: str) -> str:
    name = _dotted(location)
    if kind == "missing":
        return f"{document.at(location[:-1])}: {name} is missing: add it"
    if kind == "extra_forbidden":
        known = _known(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"{document.at(location, key=True)}: there is no setting {name}: {hint}"
    said = message.removeprefix("Value error, ")
    return f"{document.at(location)}: {name}: {said}" if name else f"{document.at(())}: {said}"


def _dotted(location: tuple[str | int, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


_PARTS: dict[str, type[BaseModel]] = {
    "listen": ListenSettings,
    "keys": KeySource,
    "admin_keys": KeySource,
    "limits": LimitSettings,
    "health": HealthSettings,
    "models": ModelSettings,
    "replicas": ReplicaSettings,
    "key": KeySource,
    "queue": QueueSettings,
    "sleep": SleepSettings,
}


def _known(location: tuple[str | int, ...]) -> list[str]:
    """The settings there are in the part at ``location``."""
    names = [part for part in location if isinstance(part, str)]
    model: type[BaseModel] = RouterSettings
    if names:
        model = GpuSettings if names[0] == "gpus" else _PARTS[names[-1]]
    fields: dict[str, Any] = model.model_fields
    return sorted(fields)
