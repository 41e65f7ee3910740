"""The server in front, without a model: what it imports, hands over, and does when a replica cannot start."""

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
from modellink.infer.server.replicas import Replica, make_front

async def ask():
    front = make_front([Replica(0, "http://127.0.0.1:1")], largest_body=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://front") as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.post("/v1/completions", json={})).json()["error"]["message"] == "no replica is ready"
        assert (await client.post("/v1/completions", content=b"x" * 2000)).status_code == 413

asyncio.run(ask())
print(sorted({"torch", "megatron", "transformers", "modellink.infer.batch"} & set(sys.modules)))
"""
# A replica that ends with status 2, `ready` says whether after it answered; one that is started a second time ends its front.
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


def test_it_needs_nothing_of_the_model():
    found = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


def hand_over(answer: Any, *, raw_path: bytes = b"/v1/models", query: bytes = b"", headers: Any = (),
              replica: Any = None) -> Any:
    """What the front says where a replica says what `answer` makes of a request."""
    from starlette.requests import Request

    from modellink.infer.server.replicas import Replica, _hand_over
    replica = Replica(0, "http://replica:1") if replica is None else replica
    replica.ready = True

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            scope = {"type": "http", "method": "GET", "path": "/v1/models", "raw_path": raw_path, "query_string": query,
                     "headers": list(headers), "server": ("x/foo", 80)}
            return await _hand_over(client, [replica], Request(scope, receive), b"")
    return asyncio.run(run())


def test_a_replica_gets_the_path_and_the_key_as_the_client_wrote_them():
    asked: list[Any] = []

    def answer(request: Any) -> Any:
        asked.append(request)
        return httpx.Response(200)
    key = "Bearer Schlüssel".encode()
    path, query = b"/v1/models/a%2541%3Fb%2Fc", b"a=1&a=2&b=%26"
    headers = [(b"host", b"x/foo"), (b"authorization", key)]
    assert hand_over(answer, raw_path=path, query=query, headers=headers).status_code == 200
    assert asked[0].url.raw_path == path + b"?" + query and asked[0].url.host == "replica"
    assert (b"Authorization", key) in [(name.title(), value) for name, value in asked[0].headers.raw]


@pytest.fixture
def signals() -> Iterator[None]:
    """What a server makes of signals is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ready", [False, True])
def test_a_mistake_found_at_the_start_of_a_replica_ends_the_front(tmp_path, monkeypatch, capfd, signals, ready):
    """One that did answer is started again whatever its status; here the second one ends the front."""
    from modellink.core.launch import free_port
    from modellink.infer.server import replicas, run
    from modellink.kernels.errors import ModelLinkError
    (tmp_path / "replica.py").write_text(REPLICA)
    monkeypatch.setattr(replicas, "FIRST_WAIT", 0.1)
    command = [sys.executable, str(tmp_path / "replica.py"), str(tmp_path / "starts"), str(int(ready))]
    one = replicas.OwnReplica(0, command, {"PARENT": str(os.getpid())})
    sockets = run.bind("127.0.0.1", free_port())
    if ready:
        run.serve_replicas([one], sockets)
    else:
        with pytest.raises(ModelLinkError, match="replica 0 cannot start") as found:
            run.serve_replicas([one], sockets)
        assert found.value.exit_status == 2
    assert Path(tmp_path / "starts").read_text() == ("xx" if ready else "x")
    assert "the cache has no room" in capfd.readouterr().err


def test_a_stream_that_nobody_began_to_read_is_not_under_way():
    """The client went as the replica began to answer; the front sends what it says to the ones that have the least under way."""
    from modellink.infer.server.replicas import Replica
    replica = Replica(0, "http://replica:1")
    response = hand_over(lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, content=b"data: 1"),
                         replica=replica)

    async def send(_: Any) -> None:
        raise OSError

    async def receive() -> Any:
        return await asyncio.Event().wait()
    assert replica.under_way == 1
    with pytest.raises(Exception):  # noqa: B017 - another one in each version of starlette
        asyncio.run(response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
    assert replica.under_way == 0


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of a server that is ready, with metrics as others write them."""
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


def test_no_proxy_stands_before_replicas_of_this_machine_and_their_metrics_are_joined(elsewhere, monkeypatch):
    from starlette.testclient import TestClient

    from modellink.infer.server.replicas import Replica, make_front
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with TestClient(make_front([Replica(0, elsewhere)], largest_body=1000)) as client:
        deadline = time.monotonic() + 10
        while (state := client.get("/health").json()["ready"]) != 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert state == 1
        text = client.get("/metrics").text
    assert '# TYPE up gauge\nup{replica="0"} 1\n' in text and "EOF" not in text and "comment" not in text
