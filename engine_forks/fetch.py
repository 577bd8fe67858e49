# SPDX-License-Identifier: Apache-2.0
"""fetch: released files by pin, from any PEP 503 index, checked against the pin's sha256."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from http.client import IncompleteRead
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.error import URLError
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import Request, url2pathname, urlopen

from engine_forks.errors import ForkError
from engine_forks.pin import Artifact

DEFAULT_INDEX = "https://pypi.org/simple"
_TRIES = 3
_TIMEOUT_S = 120
_CHUNK = 1 << 20
# HTTPError is a URLError; of those only what the server says of itself (5xx) may pass.
_PASSING = (URLError, ConnectionError, TimeoutError)
_T = TypeVar("_T")


def default_cache() -> Path:
    return Path("~/.cache/kvcached").expanduser()


def fetch(artifact: Artifact, cache: Path) -> Path:
    """Returns the verified file in `cache`, downloading it when it is missing or damaged there."""
    path = cache / artifact.file
    if path.is_file() and sha256_of(path) == artifact.sha256:
        return path
    url = find_url(artifact)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        _patiently(lambda: _download(url, artifact, path))
    except OSError as error:
        raise ForkError(f"cannot download {_shown(url)}: {error}") from error
    return path


def find_url(artifact: Artifact) -> str:
    """Looks the file up on the index's page for its project."""
    index = os.environ.get("PIP_INDEX_URL") or DEFAULT_INDEX
    page_url = f"{index.rstrip('/')}/{artifact.project}/"
    links = _Links()
    try:
        links.feed(_patiently(lambda: _read(page_url)).decode("utf-8"))
    except OSError as error:
        raise ForkError(
            f"cannot read {_shown(page_url)}: {error}. Set PIP_INDEX_URL to an index that has"
            f" {artifact.project}, or put {artifact.file} into the cache folder (--cache)."
        ) from error
    for link in links.found:
        url = urljoin(page_url, link)
        if unquote(urlsplit(url).path).rsplit("/", 1)[-1] == artifact.file:
            return url
    raise ForkError(f"{_shown(page_url)} does not list {artifact.file}")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _download(url: str, artifact: Artifact, path: Path) -> None:
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{artifact.file}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, _open(url) as reply:
            while chunk := reply.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            # The bytes still due; a body cut short is no error to urllib.
            if getattr(reply, "length", None):
                raise ConnectionError("the connection ended early")
        if digest.hexdigest() != artifact.sha256:
            raise ForkError(
                f"{_shown(url)} has sha256 {digest.hexdigest()},"
                f" the pin says {artifact.sha256}: not used"
            )
        # Only a verified file ever gets the name that others look for.
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _patiently(action: Callable[[], _T]) -> _T:
    """Repeats what failed for a reason that may pass."""
    for attempt in range(1, _TRIES):
        try:
            return action()
        except OSError as error:
            if not isinstance(error, _PASSING) or getattr(error, "code", 500) < 500:
                raise
            time.sleep(2**attempt)
    return action()


def _read(url: str) -> bytes:
    try:
        with _open(url) as reply:
            return reply.read()
    except IncompleteRead as error:
        raise ConnectionError("the connection ended early") from error


def _open(url: str) -> BinaryIO:
    parts = urlsplit(url)
    if parts.scheme == "file":
        local = Path(url2pathname(parts.path))
        return (local / "index.html" if local.is_dir() else local).open("rb")
    if parts.scheme not in ("http", "https"):
        raise OSError(f"{parts.scheme!r} is not supported, use https or file")
    headers = {"User-Agent": "kvcached-engine-forks"}
    if parts.username is not None:
        # urllib does not read the user:password@ that pip allows in an index's address.
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    return cast(BinaryIO, urlopen(Request(_shown(url), headers=headers), timeout=_TIMEOUT_S))


def _shown(url: str) -> str:
    """The address without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
