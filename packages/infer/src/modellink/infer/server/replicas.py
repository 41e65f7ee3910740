"""Several servers of the same model behind one: `serve --replicas N` on this machine, `serve --replica-url URL` on any.

A replica of this machine is a process (with `--tp` a group of them) that runs the whole server on a port of its own, and has its
share of the accelerators; one that dies is started again, unless what it was started with is wrong. Others are servers that
somebody started elsewhere. The one in front hands a request to the replica that has the fewest under way and passes on what it
says, pieces as they come. It asks each how it is: one that cannot answer gets nothing. A request of which nothing was
answered yet goes to another replica; a stream that was under way ends with an error. Not here: keys, which the replicas ask for
themselves.
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

from modellink.infer.server.exchange import Stream, error_object, failure, gone, read_content
from modellink.kernels.errors import USER_MISTAKE, ModelLinkError

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a replica is started again; twice as long each time it dies soon
SOON = 60.0  # seconds
POLL, POLL_READY = 0.2, 2.0  # seconds between questions whether a replica is ready, and whether it still is
ASK_SECONDS = 10.0  # in which it has to say so
MOST_LOST = 2  # replicas that may end over one request: it may be what ends them
STOP_SECONDS = 40.0  # in which a replica may end by itself
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
PASSED_ON = (b"authorization", b"content-type")
GIVEN_BACK = ("content-type", "retry-after", "content-security-policy", "cache-control", "x-accel-buffering")


class Replica:
    """A server that somebody else started.

    Attributes:
        url: where it is, without a path.
        under_way: requests that it works on.
        ready: it answers.
        was_ready: it answered at some time.
        refused: it ended with a mistake of the user, which another start would only repeat.
    """

    def __init__(self, index: int, url: str) -> None:
        self.index, self.url = index, url
        self.under_way = 0
        self.ready = self.was_ready = self.refused = False

    async def live(self, client: httpx.AsyncClient) -> None:
        """Look after it until this is cancelled; returns where it can never answer."""
        await self._watch(client)

    async def stop(self) -> None:
        """The one in front ends."""

    async def _watch(self, client: httpx.AsyncClient) -> None:
        while True:
            try:
                ready = (await client.get(f"{self.url}/health", timeout=ASK_SECONDS)).status_code == 200
            except httpx.HTTPError:
                ready = False
            if ready != self.ready:
                self.ready = ready
                self.was_ready |= ready
                print(f"replica {self.index} at {self.url} {'is ready' if ready else 'does not answer'}", file=sys.stderr,
                      flush=True)
            await asyncio.sleep(POLL_READY if ready else POLL)


class OwnReplica(Replica):
    """One that is a process of ours."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__(index, "")
        self._command, self._environment = command, environment
        self.process: asyncio.subprocess.Process | None = None

    async def live(self, client: httpx.AsyncClient) -> None:
        """Start it, and again whenever it dies, until this is cancelled or it is refused."""
        from modellink.core.launch import free_port  # imports torch, which a front of other machines' servers does without
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
            wait = min(2 * wait, LONGEST_WAIT) if time.monotonic() - since < SOON else FIRST_WAIT
            print(f"replica {self.index} ended with status {status}; it is started again in {wait:.0f} s", file=sys.stderr,
                  flush=True)
            await asyncio.sleep(wait)

    async def stop(self) -> None:
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def make_replicas(count: int, arguments: Sequence[str], shares: Sequence[dict[str, str]] | None = None) -> list[Replica]:
    """Replicas that run `modellink-infer` with these arguments; each has its share of the processor, and of the free memory or
    of the accelerators (`shares`, see `device_shares`)."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "MODELLINK_REPLICAS": "1" if shares else str(count)}
    command = [sys.executable, "-m", "modellink.infer.cli", *arguments, "--replicas", "1"]
    return [OwnReplica(index, command, environment | (shares[index] if shares else {})) for index in range(count)]


def device_shares(kind: str, there: int, count: int, each: int) -> list[dict[str, str]] | None:
    """What the environment says to each of `count` replicas of `each` ranks about the accelerators; None on a CPU.

    Args:
        there: how many this process sees; where the variable is set already they are those that it names.

    Raises:
        ModelLinkError: there are too few.
    """
    if (variable := VISIBLE.get(kind)) is None:
        return None
    names = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()] or list(map(str, range(there)))
    if len(names) < count * each:
        raise ModelLinkError(f"{count} replicas of {each} ranks need {count * each} devices, there are {len(names)}",
                             where="--replicas", fix=f"use at most {len(names) // each} replicas")
    return [{variable: ",".join(names[index * each:(index + 1) * each])} for index in range(count)]


def make_front(replicas: Sequence[Replica], *, largest_body: int, on_refused: Callable[[], None] = lambda: None) -> FastAPI:
    """The application in front of replicas that it starts and stops; `on_refused` is called when one can never answer."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10), limits=limits,
                               mounts={"all://127.0.0.1": None})  # whatever proxy the environment names

    async def look_after(replica: Replica) -> None:
        await replica.live(client)
        on_refused()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        lives = [asyncio.ensure_future(look_after(replica)) for replica in replicas]
        yield
        for task in lives:
            task.cancel()
        await asyncio.gather(*(replica.stop() for replica in replicas))
        await client.aclose()

    app = FastAPI(title="ModelLink", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @app.get("/health")
    async def health() -> Response:
        ready = sum(replica.ready for replica in replicas)
        state = {"status": "ok" if ready else "starting", "replicas": len(replicas), "ready": ready}
        return JSONResponse(state, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        async def ask(replica: Replica) -> str:
            try:
                answer = await client.get(f"{replica.url}/metrics", timeout=ASK_SECONDS)
            except httpx.HTTPError:
                return ""
            return answer.text if answer.status_code == 200 else ""
        asked = [replica for replica in replicas if replica.ready]
        texts = dict(zip([one.index for one in asked], await asyncio.gather(*map(ask, asked)), strict=True))
        ready = "\n".join(f'modellink_replica_ready{{replica="{one.index}"}} {one.ready:d}' for one in replicas)
        head = "# HELP modellink_replica_ready Whether a replica answers.\n# TYPE modellink_replica_ready gauge\n"
        return PlainTextResponse(f"{head}{ready}\n{join_metrics(texts)}", media_type="text/plain; version=0.0.4")

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def rest(request: Request) -> Response:
        content = await read_content(request, largest_body)
        if content is None:
            return failure(413, f"the body is larger than {largest_body} bytes", "invalid_request_error")
        return await _hand_over(client, replicas, request, content)

    return app


async def _hand_over(client: httpx.AsyncClient, replicas: Sequence[Replica], request: Request, content: bytes) -> Response:
    """The answer of the replica with the least to do; of the next one, if that dies before it says anything, or says 503."""
    scope, tried = request.scope, set[int]()
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")  # as the client wrote it
    lost, refusal = 0, None
    while lost < MOST_LOST and (open_ones := [one for one in replicas if one.ready and one.index not in tried]):
        replica = min(open_ones, key=lambda one: one.under_way)
        tried.add(replica.index)
        asked = client.build_request(request.method, httpx.URL(replica.url).copy_with(raw_path=target), content=content,
                                     headers=[(name, value) for name, value in scope["headers"] if name in PASSED_ON])
        replica.under_way += 1
        streaming = False
        try:
            answer = await _unless_gone(request, client.send(asked, stream=True))
            if answer is None:
                return Response(status_code=499)
            given = {name: answer.headers[name] for name in GIVEN_BACK if name in answer.headers}
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                streaming = True

                async def left(replica: Replica = replica, answer: httpx.Response = answer) -> None:
                    replica.under_way -= 1
                    await answer.aclose()
                return Stream(_pass_on(answer), left, answer.status_code, given)
            try:
                whole = await _unless_gone(request, answer.aread())
            finally:
                await answer.aclose()
            found = Response(whole or b"", answer.status_code, given)
            if answer.status_code != 503:
                return found
            lost, refusal = lost + 1, found
        except httpx.ConnectError:
            replica.ready = False  # before anybody noticed that it ended; it is asked again soon
        except httpx.HTTPError:
            lost += 1
        finally:
            if not streaming:
                replica.under_way -= 1
    why = "the replicas ended before they answered" if tried else "no replica is ready"
    return refusal or failure(503, why, "server_error", headers={"Retry-After": "5"})


async def _unless_gone(request: Request, work: Any) -> Any:
    """What `work` gives; None, and it is cancelled, where the client goes before that."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        leaving.cancel()
        task.cancel()


async def _pass_on(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.HTTPError:
        yield f"data: {json.dumps(error_object('the replica ended', 'server_error'))}\n\n".encode()


def join_metrics(texts: dict[int, str]) -> str:
    """Metrics of several replicas as one text: each sample gets the label `replica`, samples of a name stay together."""
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
    """In the child: let it end when the process in front is killed (Linux)."""
    prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)
