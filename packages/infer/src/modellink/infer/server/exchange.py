"""What the server with the model and the one in front do alike: read a body, notice that a client goes, and write an error.

Nothing here needs the model, so that the one in front, which has none, is small and starts at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send


async def read_content(request: Request, largest: int) -> bytes | None:
    """The body; None where it is too large, without reading on."""
    if int(request.headers.get("content-length") or 0) > largest:
        return None
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > largest:
            return None
    return bytes(content)


class Stream(StreamingResponse):
    """Pieces as they come, then `closed`; a `finally` of theirs would not run where the client goes before the first one."""

    def __init__(self, pieces: AsyncIterator[str | bytes], closed: Callable[[], Awaitable[None]], status: int = 200,
                 headers: Mapping[str, str] | None = None, media_type: str | None = None) -> None:
        super().__init__(pieces, status, headers, media_type)
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._closed()


async def gone(request: Request) -> None:
    """Wait until the client goes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_object(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """The object of OpenAI's API that says what went wrong."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def failure(status: int, message: str, kind: str, param: str | None = None, *,
            headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_object(message, kind, param), status, headers=headers)
