# SPDX-License-Identifier: Apache-2.0
"""Reads the router's YAML file: each mistake is told with its line and the remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ..config import ConfigError
from .document import Document, read
from .keys import Keys, KeySource, collect
from .settings import MisplacedError, RouterSettings


class Loaded(BaseModel):
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
        if isinstance(cause, MisplacedError):
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


def _known(location: tuple[str | int, ...]) -> list[str]:
    """The settings there are in the part at ``location``."""
    model: type[BaseModel] = RouterSettings
    for part in location:
        found = model.model_fields.get(str(part))
        # Indices, and names that the operator chose, lead to no part of their own.
        model = (found and _part(found.annotation)) or model
    return sorted(model.model_fields)


def _part(annotation: Any) -> type[BaseModel] | None:
    """The settings within a list, a mapping or an option of settings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((part for inner in get_args(annotation) if (part := _part(inner))), None)
