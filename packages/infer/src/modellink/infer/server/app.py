"""The endpoints. A handler lets the requests of a body join the batch and sends what comes; when its client goes, they leave.

A client that reads slowly holds back nobody: its pieces wait in a queue that is no longer than its answer. Not here: TLS, users.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modellink.data_prep import Tokenizer
from modellink.infer.batch import TooLong
from modellink.infer.server import protocol
from modellink.infer.server.body import Asked, in_api_words, read_asked, read_body
from modellink.infer.server.exchange import Stream, error_object, failure, gone, read_content
from modellink.infer.server.fields import field
from modellink.infer.server.service import Busy, Event, Failed, Service, Submission
from modellink.kernels.errors import ModelLinkError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(service: Service, *, name: str, api_key: str | None, largest_body: int) -> FastAPI:
    """The application around a service that is started with it and stopped after it.

    Args:
        name: of the model; a request may name another only if it is empty.
        api_key: what `Authorization: Bearer` must say; None asks for none.
        largest_body: in bytes.
    """
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="ModelLink", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    model = {"id": name, "object": "model", "created": 0, "owned_by": "modellink"}

    app.add_middleware(Guard, service=service, api_key=api_key)

    @app.exception_handler(404)
    async def missing(request: Request, _: Exception) -> Response:
        return failure(404, f"there is nothing at {request.method} {request.scope['path']}", "not_found_error")

    @app.exception_handler(405)
    async def method(request: Request, _: Exception) -> Response:
        return failure(405, f"{request.scope['path']} does not take {request.method}", "invalid_request_error")

    @app.exception_handler(500)
    async def fault(_: Request, error: Exception) -> Response:
        return failure(500, f"a fault of the server: {type(error).__name__}", "server_error")  # the trace goes to its log

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads this, but it is counted

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        text = files("modellink.infer.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    async def health() -> Response:
        if service.failure is not None:
            return JSONResponse({"status": "failed", "reason": service.failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(_gauges(service)), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> Response:
        return JSONResponse(model) if wanted == name else _no_model(wanted, name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, name, largest_body, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, name, largest_body, chat=True)

    return app


class Guard:
    """Asks for the API key and counts the answers.

    Plain ASGI: the framework's own kind of middleware hands every streamed piece on through a task of its own.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None) -> None:
        self.app, self.service, self.api_key = app, service, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.api_key is not None and scope["path"].startswith("/v1/"):  # what routes; the URL has the client's Host in it
            given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
                refused = failure(401, "the API key is missing or wrong", "authentication_error")
                return await refused(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # not the path: who asks chooses that, and each would stay in memory
                self.service.metrics.request(route.path if route is not None else "other", message["status"])
            await send(message)
        await self.app(scope, receive, counted)


def _gauges(service: Service) -> dict[str, tuple[str, float]]:
    batch = service.batch
    return {"running": ("Answers in the batch.", len(batch.running)), "waiting": ("Answers that wait.", len(batch.waiting)),
            "cache_pages_used": ("Pages of the cache in use.", sum(pool.used for pool in batch.cache.pools)),
            "cache_pages": ("Pages of the cache.", sum(pool.pages for pool in batch.cache.pools))}


async def _answer(service: Service, request: Request, name: str, largest_body: int, *, chat: bool) -> Response:
    """From a body to its response."""
    content = await read_content(request, largest_body)
    if content is None:
        return failure(413, f"the body is larger than {largest_body} bytes", "invalid_request_error")
    queue: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    tokenizer = service.engine.tokenizer

    def notify(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)
    try:
        body = read_body(content)
        wanted = field(body, "model", str, name)
        if wanted != name:
            return _no_model(wanted, name)
        read = partial(read_asked, body, chat=chat, spec=service.engine.spec, tokenizer=tokenizer, model=name,
                       most=service.batch.cache.tokens, prompt_type=service.engine.plan.prompt_type,
                       most_answers=service.most_waiting)
        asked = await asyncio.to_thread(read)
        try:
            submission = service.submit(asked.requests, notify, every_piece=asked.stream)
        except TooLong as error:
            raise in_api_words(error, body, chat=chat) from None
    except Busy as error:
        service.metrics.count("refused")
        return failure(429, error.what, "rate_limit_error", headers={"Retry-After": "1"})
    except Failed as error:
        return failure(503, error.what, "server_error")
    except ModelLinkError as error:
        return failure(400, error.what + (f"; {error.fix}" if error.fix else ""), "invalid_request_error",
                        str(error.where) if error.where else None)
    if asked.stream:
        async def left() -> None:
            service.cancel(submission)
        return Stream(_stream(asked, submission, queue, tokenizer), left, headers={
            "Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
    try:
        fault = await _all(request, submission, queue)
    finally:
        service.cancel(submission)
    if fault is not None:
        return failure(500 if service.usable else 503, fault, "server_error")
    return JSONResponse(protocol.whole(asked, submission.answers, tokenizer))


async def _all(request: Request, submission: Submission, queue: asyncio.Queue[Event]) -> str | None:
    """Wait for all answers; what failed, if something did.

    Raises:
        ClientDisconnect: the client went.
    """
    left = len(submission.answers)
    leaving = asyncio.ensure_future(gone(request))
    try:
        while left:
            event = asyncio.ensure_future(queue.get())
            await asyncio.wait({event, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                raise ClientDisconnect
            if event.result().failure is not None:
                return event.result().failure
            left -= event.result().done
    finally:
        leaving.cancel()
    return None


async def _stream(asked: Asked, submission: Submission, queue: asyncio.Queue[Event],
                  tokenizer: Tokenizer | None) -> AsyncIterator[str]:
    """Server-sent events: the pieces, how each answer ended, the usage where it was asked for, and [DONE]."""
    shown, started = [0] * len(submission.answers), [False] * len(submission.answers)
    ended = 0  # by their events: an answer is finished a moment before its last piece is here
    while ended < len(submission.answers):
        event = await queue.get()
        answer = submission.answers[event.index]
        if event.failure is not None:
            yield _event(error_object(event.failure, "server_error"))
            return
        if event.piece or event.done or answer.request.logprobs or not started[event.index]:
            probabilities, shown[event.index] = protocol.logprobs(answer, tokenizer, shown[event.index], chat=asked.chat)
            yield _event(protocol.chunk(asked, event.index, event.piece, first=not started[event.index],
                                        probabilities=probabilities, echo=answer.request.before))
            started[event.index] = True
        if event.done:
            ended += 1
            yield _event(protocol.chunk(asked, event.index, None, first=False, finish=protocol.finish_reason(answer)))
    if asked.usage:
        yield _event(protocol.last_chunk(asked, submission.answers))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _no_model(wanted: str, name: str) -> Response:
    return failure(404, f"there is no model {wanted[:200]!r}, there is {name!r}", "not_found_error", "model")
