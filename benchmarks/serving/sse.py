# SPDX-License-Identifier: Apache-2.0
"""Server-sent events of a completion, read with as little work as a busy client can do."""

from __future__ import annotations

import json

_DATA = b"data: "
_DONE = b"data: [DONE]"


class StreamError(RuntimeError):
    """The server ended the stream with an error."""


class Completion:
    """Follows one streamed completion; only its last event and errors are parsed as JSON."""

    def __init__(self) -> None:
        self.events = 0
        """Those with tokens."""
        self.tokens: int | None = None
        """As the server counts them; known at the end."""
        self.done = False
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """Takes what came, whole events or pieces; returns how many events with tokens it ended.

        Raises:
            StreamError: the server says so.
        """
        before = self.events
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            event = event.strip()
            if event == _DONE:
                self.done = True
            elif not event.startswith(_DATA):
                continue  # a comment, or an empty line
            elif event.startswith(b'data: {"error"'):
                raise StreamError(event[len(_DATA) :].decode(errors="replace"))
            elif b'"choices":[]' in event:
                usage = json.loads(event[len(_DATA) :]).get("usage") or {}
                self.tokens = usage.get("completion_tokens", self.tokens)
            else:
                self.events += 1
        return self.events - before
