# SPDX-License-Identifier: Apache-2.0
"""The HTTP endpoints. A handler submits the completions of a request and sends their text; a disconnect
cancels them.

A client that reads slowly delays nobody: its pieces wait in a queue, which is never longer than its
completions. Not here: TLS, user accounts.
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
from modellink.infer.batch import ExceedsCache
from modellink.infer.server import protocol
from modellink.infer.server.body import CompletionCall, name_field, parse_call, read_body
from modellink.infer.server.fields import field
from modellink.infer.server.http import Stream, disconnected, error_object, error_response, read_content
from modellink.infer.server.service import Busy, Event, Service, Stopped, Submission
from modellink.kernels.errors import ModelLinkError

POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
          "img-src data:")


def make_app(service: Service, *, name: str, api_key: str | None, max_body: int) -> FastAPI:
    """Return the application of a service, which starts and stops with it.

    Args:
        name: of the model; requests must use it or omit it.
        api_key: key that `Authorization: Bearer` must carry; None: no key is needed.
        max_body: maximum size of a body in bytes.
    """
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="ModelLink", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    model = {"id": name, "object": "model", "created": 0, "owned_by": "modellink"}
    app.add_middleware(AccessMiddleware, service=service, api_key=api_key)
    _add_error_handlers(app)

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
        return PlainTextResponse(service.metrics.text(_gauges(service)),
                                 media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> Response:
        return JSONResponse(model) if wanted == name else _unknown_model(wanted, name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _complete(service, request, name, max_body, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete(service, request, name, max_body, chat=True)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(404)
    async def not_found(request: Request, _: Exception) -> Response:
        return error_response(404, f"{request.method} {request.scope['path']} does not exist",
                              "not_found_error")

    @app.exception_handler(405)
    async def wrong_method(request: Request, _: Exception) -> Response:
        return error_response(405, f"{request.scope['path']} does not support {request.method}",
                              "invalid_request_error")

    @app.exception_handler(500)
    async def server_error(_: Request, error: Exception) -> Response:  # the traceback goes to the log
        return error_response(500, f"internal server error: {type(error).__name__}", "server_error")

    @app.exception_handler(ClientDisconnect)
    async def client_left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it, but it is counted


class AccessMiddleware:
    """Checks the API key and counts the responses.

    Plain ASGI: the framework's own middleware class forwards every streamed piece through an additional task.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None) -> None:
        self.app, self.service, self.api_key = app, service, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # the routed path; the URL depends on the Host header
        if self.api_key is not None and scope["path"].startswith("/v1/"):
            given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
                refused = error_response(401, "the API key is missing or wrong", "authentication_error")
                return await refused(scope, receive, send)

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # not the path: clients choose it, and each would take memory
                self.service.metrics.request(route.path if route is not None else "other", message["status"])
            await send(message)
        await self.app(scope, receive, count_and_send)


def _gauges(service: Service) -> dict[str, tuple[str, float]]:
    batch = service.batch
    return {"running": ("Completions in the batch.", len(batch.running)),
            "waiting": ("Completions waiting.", len(batch.waiting)),
            "cache_pages_used": ("Cache pages in use.", sum(pool.used for pool in batch.cache.pools)),
            "cache_pages": ("Cache pages in total.", sum(pool.pages for pool in batch.cache.pools))}


async def _complete(service: Service, request: Request, name: str, max_body: int, *, chat: bool) -> Response:
    """Return the response to a completion request."""
    content = await read_content(request, max_body)
    if content is None:
        return error_response(413, f"the body is larger than {max_body} bytes", "invalid_request_error")
    queue: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    tokenizer = service.engine.tokenizer

    def notify(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)
    try:
        body = read_body(content)
        wanted = field(body, "model", str, name)
        if wanted != name:
            return _unknown_model(wanted, name)
        parse = partial(parse_call, body, chat=chat, spec=service.engine.spec, tokenizer=tokenizer,
                        model=name, max_tokens=service.batch.cache.max_sequence_tokens,
                        prompt_type=service.engine.plan.prompt_type, max_completions=service.max_waiting)
        call = await asyncio.to_thread(parse)
        try:
            submission = service.submit(call.requests, notify, every_piece=call.stream)
        except ExceedsCache as error:
            raise name_field(error, body, chat=chat) from None
    except Busy as error:
        service.metrics.count("refused")
        return error_response(429, error.what, "rate_limit_error", headers={"Retry-After": "1"})
    except Stopped as error:
        return error_response(503, error.what, "server_error")
    except ModelLinkError as error:
        message = f"{error.what}; {error.fix}" if error.fix else error.what
        return error_response(400, message, "invalid_request_error",
                              str(error.where) if error.where else None)
    if call.stream:
        async def cancel() -> None:
            service.cancel(submission)
        return Stream(_events(call, submission, queue, tokenizer), cancel, headers={
            "Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
    try:
        failure = await _wait_for_all(request, submission, queue)
    finally:
        service.cancel(submission)
    if failure is not None:
        return error_response(500 if service.usable else 503, failure, "server_error")
    return JSONResponse(protocol.full_response(call, submission.completions, tokenizer))


async def _wait_for_all(request: Request, submission: Submission, queue: asyncio.Queue[Event]) -> str | None:
    """Wait for all completions. Return the failure of the first one that fails, if any.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    remaining = len(submission.completions)
    leaving = asyncio.ensure_future(disconnected(request))
    try:
        while remaining:
            event = asyncio.ensure_future(queue.get())
            await asyncio.wait({event, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                raise ClientDisconnect
            if event.result().failure is not None:
                return event.result().failure
            remaining -= event.result().done
    finally:
        leaving.cancel()
    return None


async def _events(call: CompletionCall, submission: Submission, queue: asyncio.Queue[Event],
                  tokenizer: Tokenizer | None) -> AsyncIterator[str]:
    """Yield server-sent events: pieces of text, the finish reason of each completion, the usage if requested,
    and [DONE]."""
    shown, started = [0] * len(submission.completions), [False] * len(submission.completions)
    # counted by events: a completion has its finish reason a moment before its last piece arrives
    finished = 0
    while finished < len(submission.completions):
        event = await queue.get()
        index, completion = event.index, submission.completions[event.index]
        if event.failure is not None:
            yield _event(error_object(event.failure, "server_error"))
            return
        if event.piece or event.done or completion.request.logprobs or not started[index]:
            probabilities, shown[index] = protocol.logprobs(completion, tokenizer, shown[index],
                                                            chat=call.chat)
            yield _event(protocol.chunk(call, index, event.piece, first=not started[index],
                                        probabilities=probabilities, echo=completion.request.text_prefix))
            started[index] = True
        if event.done:
            finished += 1
            yield _event(protocol.chunk(call, index, None, first=False,
                                        finish=protocol.finish_reason(completion)))
    if call.usage:
        yield _event(protocol.usage_chunk(call, submission.completions))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _unknown_model(wanted: str, name: str) -> Response:
    return error_response(404, f"unknown model {wanted[:200]!r}, the model is {name!r}", "not_found_error",
                          "model")
