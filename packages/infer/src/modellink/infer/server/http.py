# SPDX-License-Identifier: Apache-2.0
"""What the server with the model and the server in front of replicas share: read a body, detect a disconnect,
write an error.

Imports nothing of the model, so that a server that only forwards requests is small and starts at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send


async def read_content(request: Request, max_body: int) -> bytes | None:
    """Return the body; None, without reading the rest, if it is larger than `max_body` bytes."""
    if int(request.headers.get("content-length") or 0) > max_body:
        return None
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_body:
            return None
    return bytes(content)


class Stream(StreamingResponse):
    """A streamed response that always calls `on_close`; a `finally` in `pieces` would not run if the client
    disconnects first."""

    def __init__(self, pieces: AsyncIterator[str | bytes], on_close: Callable[[], Awaitable[None]],
                 status: int = 200, headers: Mapping[str, str] | None = None,
                 media_type: str | None = None) -> None:
        super().__init__(pieces, status, headers, media_type)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._on_close()


async def disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_object(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return the error object of OpenAI's API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def error_response(status: int, message: str, kind: str, param: str | None = None, *,
                   headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_object(message, kind, param), status, headers=headers)
