# SPDX-License-Identifier: Apache-2.0
"""The server in front of replicas: what it imports and forwards, and what it does if a replica cannot start.
"""

from __future__ import annotations

import asyncio
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
ASKED = """
import asyncio, sys
import httpx
from modellink.infer.server import run
from modellink.infer.server.front import make_front
from modellink.infer.server.replicas import Replica

async def ask():
    front = make_front([Replica(0, "http://127.0.0.1:1")], max_body=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://front") as client:
        assert (await client.get("/health")).status_code == 503
        answer = (await client.post("/v1/completions", json={})).json()
        assert answer["error"]["message"] == "no replica is ready"
        assert (await client.post("/v1/completions", content=b"x" * 2000)).status_code == 413

asyncio.run(ask())
print(sorted({"torch", "megatron", "transformers", "modellink.infer.batch"} & set(sys.modules)))
"""
# A replica that exits with status 2, if READY is 1 after a health check; at its second start it stops the
# server in front.
REPLICA = """
import http.server, os, signal, sys
starts, ready, port = sys.argv[1], sys.argv[2] == "1", int(sys.argv[-1])
with open(starts, "a") as file:
    file.write("x")
if os.path.getsize(starts) == 2:
    os.kill(int(os.environ["PARENT"]), signal.SIGTERM)
    signal.pause()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

if ready:
    with http.server.HTTPServer(("127.0.0.1", port), Handler) as server:
        server.handle_request()
        server.handle_request()
print("error: the cache has no room", file=sys.stderr)
sys.exit(2)
"""


def test_it_imports_nothing_of_the_model():
    found = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


def forward(respond: Any, *, raw_path: bytes = b"/v1/models", query: bytes = b"", headers: Any = (),
            replica: Any = None, others: Any = ()) -> Any:
    """Return the response of the server in front if the replica responds to a request with
    `respond(request)`."""
    from starlette.requests import Request

    from modellink.infer.server.front import _forward
    from modellink.infer.server.replicas import Replica
    replica = Replica(0, "http://replica:1") if replica is None else replica
    replica.ready = True

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as client:
            scope = {"type": "http", "method": "GET", "path": "/v1/models", "raw_path": raw_path,
                     "query_string": query, "headers": list(headers), "server": ("x/foo", 80)}
            return await _forward(client, [*others, replica], Request(scope, receive), b"")
    return asyncio.run(run())


def test_path_and_key_are_forwarded_unchanged():
    asked: list[Any] = []

    def respond(request: Any) -> Any:
        asked.append(request)
        return httpx.Response(200)
    key = "Bearer Schlüssel".encode()
    path, query = b"/v1/models/a%2541%3Fb%2Fc", b"a=1&a=2&b=%26"
    headers = [(b"host", b"x/foo"), (b"authorization", key)]
    assert forward(respond, raw_path=path, query=query, headers=headers).status_code == 200
    assert asked[0].url.raw_path == path + b"?" + query and asked[0].url.host == "replica"
    assert (b"Authorization", key) in [(name.title(), value) for name, value in asked[0].headers.raw]


def test_a_request_goes_to_the_replica_with_the_fewest_requests():
    from modellink.infer.server.replicas import Replica
    busy, free, down = (Replica(index, f"http://replica{index}:1") for index in range(3))
    busy.active, free.active, busy.ready = 3, 1, True
    asked: list[str] = []

    def respond(request: Any) -> Any:
        asked.append(request.url.host)
        return httpx.Response(503 if request.url.host == "replica1" else 200)
    assert forward(respond, replica=free, others=[busy, down]).status_code == 200
    assert asked == ["replica1", "replica0"]  # the next one after a refusal, and none that is not ready
    assert (busy.active, free.active) == (3, 1)


@pytest.fixture
def signals() -> Iterator[None]:
    """Restores the signal handlers afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ready", [False, True])
def test_a_replica_with_wrong_options_stops_the_server(tmp_path, monkeypatch, capfd, signals, ready):
    """One that has been ready is restarted whatever its status; here the second start stops the server."""
    from modellink.core.launch import free_port
    from modellink.infer.server import replicas, run
    from modellink.kernels.errors import ModelLinkError
    (tmp_path / "replica.py").write_text(REPLICA)
    monkeypatch.setattr(replicas, "FIRST_WAIT", 0.1)
    command = [sys.executable, str(tmp_path / "replica.py"), str(tmp_path / "starts"), str(int(ready))]
    one = replicas.LocalReplica(0, command, {"PARENT": str(os.getpid())})
    sockets = run.bind("127.0.0.1", free_port())
    if ready:
        run.serve_replicas([one], sockets)
    else:
        with pytest.raises(ModelLinkError, match="replica 0 cannot start") as found:
            run.serve_replicas([one], sockets)
        assert found.value.exit_status == 2
    assert Path(tmp_path / "starts").read_text() == ("xx" if ready else "x")
    assert "the cache has no room" in capfd.readouterr().err


def test_a_stream_that_is_never_read_is_not_active():
    """The client disconnects as the replica starts to respond."""
    from modellink.infer.server.replicas import Replica
    replica = Replica(0, "http://replica:1")
    response = forward(lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"},
                                                content=b"data: 1"),
                         replica=replica)

    async def send(_: Any) -> None:
        raise OSError

    async def receive() -> Any:
        return await asyncio.Event().wait()
    assert replica.active == 1
    with pytest.raises(Exception):  # noqa: B017 - the class depends on the version of starlette
        asyncio.run(response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
    assert replica.active == 0


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of a ready server whose metrics have comments and empty lines."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"# a comment\n# HELP up Whether.\n# TYPE up gauge\n\nup 1\n# EOF\n")

        def log_message(self, *_: Any) -> None:
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_no_proxy_is_used_for_local_replicas_and_their_metrics_are_joined(elsewhere, monkeypatch):
    from starlette.testclient import TestClient

    from modellink.infer.server.front import make_front
    from modellink.infer.server.replicas import Replica
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with TestClient(make_front([Replica(0, elsewhere)], max_body=1000)) as client:
        deadline = time.monotonic() + 10
        while (state := client.get("/health").json()["ready"]) != 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert state == 1
        text = client.get("/metrics").text
    assert '# TYPE up gauge\nup{replica="0"} 1\n' in text and "EOF" not in text and "comment" not in text
