# SPDX-License-Identifier: Apache-2.0
"""YAML that remembers where each value was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import ConfigError

Location = tuple[str | int, ...]
"""Keys and indices from the root to a value."""


@dataclass(frozen=True, slots=True)
class Document:
    """The values of one file, and the line and column (from 1) of each key and value."""

    path: Path
    data: Any
    values: dict[Location, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Location, tuple[int, int]] = field(default_factory=dict)

    def at(self, location: Sequence[str | int], *, key: bool = False) -> str:
        """``file:line:column`` of a value, or of what would hold it if it is not there.

        Args:
            location: keys and indices from the root.
            key: where its key is, instead.
        """
        where = tuple(location)
        if key and where in self.keys:
            line, column = self.keys[where]
            return f"{self.path}:{line}:{column}"
        while where and where not in self.values:
            where = where[:-1]
        line, column = self.values.get(where, (1, 1))
        return f"{self.path}:{line}:{column}"


def read(path: Path) -> Document:
    """Read the one YAML document in ``path``.

    Raises:
        ConfigError: it cannot be read or is no YAML; the message begins with where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a YAML file that can be read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is no UTF-8: save it as UTF-8") from None
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        document = Document(path, None)
        if root is None:
            return document
        data = _Builder(document, loader).build(root, (), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: not YAML: {said}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    finally:
        loader.dispose()
    return Document(path, data, document.values, document.keys)


class _Builder:
    """Turns nodes into values, and notes where they are."""

    def __init__(self, document: Document, loader: Any) -> None:
        self._document = document
        self._loader = loader

    def build(self, node: Any, location: Location, parents: tuple[int, ...]) -> Any:
        if id(node) in parents:
            raise ConfigError(f"{self._where(node)}: this anchor contains itself: write it out")
        parents = (*parents, id(node))
        self._document.values[location] = _position(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location, parents)
        if isinstance(node, yaml.SequenceNode):
            children = enumerate(node.value)
            return [self.build(child, (*location, index), parents) for index, child in children]
        return self._loader.construct_object(node)

    def _mapping(self, node: Any, location: Location, parents: tuple[int, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self._where(key_node)}: a key must be one word")
            # As written: names of GPUs and models may look like numbers.
            key = str(key_node.value)
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(
                    f"{self._where(key_node)}: merging with '<<' is not understood: write the "
                    "settings out, or use an anchor for the whole value"
                )
            inner = (*location, key)
            if key in made:
                line = self._document.keys[inner][0]
                raise ConfigError(
                    f"{self._where(key_node)}: {key!r} is set a second time, first in line {line}: "
                    "remove one of them"
                )
            self._document.keys[inner] = _position(key_node)
            made[key] = self.build(value_node, inner, parents)
        return made

    def _where(self, node: Any) -> str:
        line, column = _position(node)
        return f"{self._document.path}:{line}:{column}"


def _position(node: Any) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
