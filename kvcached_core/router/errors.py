# SPDX-License-Identifier: Apache-2.0
"""Failures as the OpenAI protocol tells them."""

from __future__ import annotations

import json
import math


class ApiError(Exception):
    """The answer to a request that fails here; the message names the remedy."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after
        """Seconds after which it makes sense to ask again."""

    @property
    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            seconds = max(1, math.ceil(self.retry_after))
            headers.append((b"retry-after", str(seconds).encode()))
        if self.status == 408:  # the rest of the body would be taken for the next request
            headers.append((b"connection", b"close"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


def unavailable(message: str, code: str, retry_after: float) -> ApiError:
    """Not now: status 503 with Retry-After, in seconds."""
    return ApiError(503, message, "service_unavailable", code, retry_after=retry_after)
