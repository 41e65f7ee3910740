"""Several servers of the same model behind one address: `serve --replicas N` on this machine, `serve
--replica-url URL` on any.

A replica on this machine is a process (with `--tp` a group of processes) that runs the full server on its own
port with its share of the accelerators. It is restarted when it exits, unless its options are wrong. Other
replicas are servers that were started elsewhere. The server in front sends each request to the replica with
the fewest requests, forwards the response as it comes, and checks the health of every replica; an unhealthy
one gets no requests. A request that has no response yet is retried on another replica; a stream that breaks
off ends with an error. Not here: API keys, which the replicas check.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from modellink.core.launch import free_port
from modellink.infer.server.http import Stream, disconnected, error_object, error_response, read_content
from modellink.kernels.errors import USER_MISTAKE, ModelLinkError

# seconds before a replica is restarted; doubled each time it exits early
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
EARLY = 60.0  # seconds
# seconds between health checks of a replica that is not ready, and of one that is
POLL, POLL_READY = 0.2, 2.0
HEALTH_TIMEOUT = 10.0  # seconds
MAX_LOST = 2  # replicas that may fail over one request, which may be the cause
STOP_TIMEOUT = 40.0  # seconds
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
REQUEST_HEADERS = (b"authorization", b"content-type")
RESPONSE_HEADERS = ("content-type", "retry-after", "content-security-policy", "cache-control",
                    "x-accel-buffering")


class Replica:
    """A server that was started elsewhere.

    Attributes:
        url: without a path.
        active: number of requests it is working on.
        ready: it passed its last health check.
        was_ready: it has passed one.
        refused: it exited because its options are wrong; a restart would not help.
    """

    def __init__(self, index: int, url: str) -> None:
        self.index, self.url = index, url
        self.active = 0
        self.ready = self.was_ready = self.refused = False

    async def run(self, client: httpx.AsyncClient) -> None:
        """Watch over the replica until cancelled; returns only if it can never be ready."""
        await self._watch(client)

    async def stop(self) -> None:
        """Called when the server in front stops."""

    async def _watch(self, client: httpx.AsyncClient) -> None:
        while True:
            try:
                ready = (await client.get(f"{self.url}/health", timeout=HEALTH_TIMEOUT)).status_code == 200
            except httpx.HTTPError:
                ready = False
            if ready != self.ready:
                self.ready = ready
                self.was_ready |= ready
                state = "is ready" if ready else "does not respond"
                print(f"replica {self.index} at {self.url} {state}", file=sys.stderr, flush=True)
            await asyncio.sleep(POLL_READY if ready else POLL)


class LocalReplica(Replica):
    """A replica in a child process."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__(index, "")
        self._command, self._environment = command, environment
        self.process: asyncio.subprocess.Process | None = None

    async def run(self, client: httpx.AsyncClient) -> None:
        """Start the process, and restart it whenever it exits, until cancelled or `refused`."""
        wait = FIRST_WAIT
        while True:
            port, since = free_port(), time.monotonic()
            self.url = f"http://127.0.0.1:{port}"
            command = [*self._command, "--host", "127.0.0.1", "--port", str(port)]
            self.process = await asyncio.create_subprocess_exec(
                *command, env=self._environment, start_new_session=True, preexec_fn=_end_with_parent)
            watch = asyncio.ensure_future(self._watch(client))
            try:
                status = await self.process.wait()
            finally:
                watch.cancel()
                self.ready = False
            self.refused = status == USER_MISTAKE and not self.was_ready
            if self.refused:
                return
            wait = min(2 * wait, LONGEST_WAIT) if time.monotonic() - since < EARLY else FIRST_WAIT
            print(f"replica {self.index} ended with status {status}; it restarts in {wait:.0f} s",
                  file=sys.stderr, flush=True)
            await asyncio.sleep(wait)

    async def stop(self) -> None:
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            process.kill()
            await process.wait()


def make_replicas(count: int, arguments: Sequence[str],
                  shares: Sequence[dict[str, str]] | None = None) -> list[Replica]:
    """Return replicas that run `modellink-infer` with these arguments.

    Args:
        shares: environment variables of each replica that select its accelerators, see `device_shares`.
            Without accelerators, the replicas share the processor cores and the free memory.
    """
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ,
                   "MODELLINK_REPLICAS": "1" if shares else str(count)}
    command = [sys.executable, "-m", "modellink.infer.cli", *arguments, "--replicas", "1"]
    return [LocalReplica(index, command, environment | (shares[index] if shares else {}))
            for index in range(count)]


def device_shares(kind: str, available: int, count: int, ranks: int) -> list[dict[str, str]] | None:
    """Return the environment variables that give each of `count` replicas its accelerators; None on a CPU.

    Args:
        available: accelerators that this process sees; if the variable is set, those that it names.
        ranks: of each replica.

    Raises:
        ModelLinkError: there are too few accelerators.
    """
    if (variable := VISIBLE.get(kind)) is None:
        return None
    names = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    names = names or [str(number) for number in range(available)]
    if len(names) < count * ranks:
        raise ModelLinkError(f"{count} replicas of {ranks} ranks need {count * ranks} devices, {len(names)} "
                             "are available",
                             where="--replicas", fix=f"use at most {len(names) // ranks} replicas")
    return [{variable: ",".join(names[index * ranks:(index + 1) * ranks])} for index in range(count)]


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
        async def fetch(replica: Replica) -> str:
            try:
                response = await client.get(f"{replica.url}/metrics", timeout=HEALTH_TIMEOUT)
            except httpx.HTTPError:
                return ""
            return response.text if response.status_code == 200 else ""
        running = [replica for replica in replicas if replica.ready]
        texts = dict(zip([one.index for one in running], await asyncio.gather(*map(fetch, running)),
                         strict=True))
        ready = "\n".join(f'modellink_replica_ready{{replica="{one.index}"}} {one.ready:d}'
                          for one in replicas)
        head = ("# HELP modellink_replica_ready Whether a replica is ready.\n"
                "# TYPE modellink_replica_ready gauge\n")
        return PlainTextResponse(f"{head}{ready}\n{join_metrics(texts)}",
                                 media_type="text/plain; version=0.0.4")

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def forward(request: Request) -> Response:
        content = await read_content(request, max_body)
        if content is None:
            return error_response(413, f"the body is larger than {max_body} bytes", "invalid_request_error")
        return await _forward(client, replicas, request, content)

    return app


async def _forward(client: httpx.AsyncClient, replicas: Sequence[Replica], request: Request,
                   content: bytes) -> Response:
    """Return the response of the replica with the fewest requests; try the next one if it fails first or
    responds with 503."""
    tried = set[int]()
    lost, refusal = 0, None
    while lost < MAX_LOST and (candidates := [one for one in replicas if one.ready
                                              and one.index not in tried]):
        replica = min(candidates, key=lambda one: one.active)
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


def _end_with_parent() -> None:
    """Let the child process exit when the server in front is killed (Linux)."""
    prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)
