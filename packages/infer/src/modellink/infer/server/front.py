# SPDX-License-Identifier: Apache-2.0
"""A server in front of replicas: `serve --replicas N` on this machine, `serve --replica-url URL` on any.

It sends each request to the replica with the fewest requests and forwards the response as it comes. It checks
the health of every replica; an unhealthy one gets no requests. A request that has no response yet is retried
on another replica; a stream that breaks off ends with an error. Imports nothing of the model. Not here: API
keys, which the replicas check.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from modellink.infer.server.http import Stream, disconnected, error_object, error_response, read_content
from modellink.infer.server.replicas import HEALTH_TIMEOUT, Replica

MAX_LOST = 2  # replicas that may fail over one request, which may be the cause
REQUEST_HEADERS = (b"authorization", b"content-type")
RESPONSE_HEADERS = ("content-type", "retry-after", "content-security-policy", "cache-control",
                    "x-accel-buffering")


def make_front(replicas: Sequence[Replica], *, max_body: int,
               on_refused: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the application in front of replicas, which it starts and stops.

    Args:
        max_body: maximum size of a body in bytes.
        on_refused: called when a replica can never be ready.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10), limits=limits,
                               mounts={"all://127.0.0.1": None})  # no proxy, even if the environment sets one

    async def run(replica: Replica) -> None:
        await replica.run(client)
        on_refused()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(run(replica)) for replica in replicas]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*(replica.stop() for replica in replicas))
        await client.aclose()

    app = FastAPI(title="ModelLink", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ClientDisconnect)
    async def client_left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @app.get("/health")
    async def health() -> Response:
        ready = sum(replica.ready for replica in replicas)
        state = {"status": "ok" if ready else "starting", "replicas": len(replicas), "ready": ready}
        return JSONResponse(state, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await _collect_metrics(client, replicas)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def forward(request: Request) -> Response:
        content = await read_content(request, max_body)
        if content is None:
            return error_response(413, f"the body is larger than {max_body} bytes", "invalid_request_error")
        return await _forward(client, replicas, request, content)

    return app


async def _collect_metrics(client: httpx.AsyncClient, replicas: Sequence[Replica]) -> str:
    """Return the metrics of all ready replicas, and which replicas are ready."""
    async def fetch(replica: Replica) -> str:
        try:
            response = await client.get(f"{replica.url}/metrics", timeout=HEALTH_TIMEOUT)
        except httpx.HTTPError:
            return ""
        return response.text if response.status_code == 200 else ""
    running = [replica for replica in replicas if replica.ready]
    texts = await asyncio.gather(*map(fetch, running))
    head = "# HELP modellink_replica_ready Whether a replica is ready.\n# TYPE modellink_replica_ready gauge"
    ready = [f'modellink_replica_ready{{replica="{one.index}"}} {one.ready:d}' for one in replicas]
    joined = join_metrics({replica.index: text for replica, text in zip(running, texts, strict=True)})
    return "\n".join([head, *ready, joined])


async def _forward(client: httpx.AsyncClient, replicas: Sequence[Replica], request: Request,
                   content: bytes) -> Response:
    """Return the response of the replica with the fewest requests; try the next one if it fails first or
    responds with 503."""
    tried = set[int]()
    lost, refusal = 0, None
    while lost < MAX_LOST and (replica := _least_busy(replicas, tried)) is not None:
        tried.add(replica.index)
        replica.active += 1
        streaming = False
        try:
            response = await _unless_disconnected(request,
                                                  client.send(_copy(client, replica, request, content),
                                                              stream=True))
            if response is None:
                return Response(status_code=499)
            headers = {name: response.headers[name] for name in RESPONSE_HEADERS if name in response.headers}
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                streaming = True

                async def close(replica: Replica = replica, response: httpx.Response = response) -> None:
                    replica.active -= 1
                    await response.aclose()
                return Stream(_pieces(response), close, response.status_code, headers)
            try:
                body = await _unless_disconnected(request, response.aread())
            finally:
                await response.aclose()
            found = Response(body or b"", response.status_code, headers)
            if response.status_code != 503:
                return found
            lost, refusal = lost + 1, found
        except httpx.ConnectError:
            replica.ready = False  # it has exited; the next health check will tell
        except httpx.HTTPError:
            lost += 1
        finally:
            if not streaming:
                replica.active -= 1
    reason = "the replicas exited before they responded" if tried else "no replica is ready"
    return refusal or error_response(503, reason, "server_error", headers={"Retry-After": "5"})


def _least_busy(replicas: Sequence[Replica], tried: set[int]) -> Replica | None:
    """Return the ready replica with the fewest requests that was not tried yet, None if all were."""
    candidates = [replica for replica in replicas if replica.ready and replica.index not in tried]
    return min(candidates, key=lambda replica: replica.active, default=None)


def _copy(client: httpx.AsyncClient, replica: Replica, request: Request, content: bytes) -> httpx.Request:
    """Return a request for a replica with the path and query exactly as the client wrote them."""
    scope = request.scope
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [(name, value) for name, value in scope["headers"] if name in REQUEST_HEADERS]
    return client.build_request(request.method, httpx.URL(replica.url).copy_with(raw_path=target),
                                content=content, headers=headers)


async def _unless_disconnected(request: Request, work: Any) -> Any:
    """Return the result of `work`; None, and cancel it, if the client disconnects first."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        leaving.cancel()
        task.cancel()


async def _pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in response.aiter_raw():
            yield piece
    except httpx.HTTPError:
        yield f"data: {json.dumps(error_object('the replica exited', 'server_error'))}\n\n".encode()


def join_metrics(texts: dict[int, str]) -> str:
    """Return the metrics of several replicas as one text, grouped by name, with the label `replica` on each
    sample."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for index, text in texts.items():
        name = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ")[2]
                if line not in heads.setdefault(name, []):
                    heads[name].append(line)
                continue
            if (found := re.fullmatch(r"([^#{ ][^{ ]*)(?:\{(.*)\})? (.*)", line)) is None:
                continue  # comments and empty lines of other servers
            key, labels, value = found.groups()
            joined = ",".join(filter(None, [f'replica="{index}"', labels]))
            samples.setdefault(name, []).append(f"{key}{{{joined}}} {value}")
    return "".join("\n".join([*lines, *samples.get(name, [])]) + "\n" for name, lines in heads.items())
