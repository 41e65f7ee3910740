# SPDX-License-Identifier: Apache-2.0
"""Replicas behind one server: what clients get, also if one is killed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
BODY = {"prompt": "The quick", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
LONG = {"prompt": "The", "max_tokens": 240, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def front(llama, tmp_path_factory) -> Iterator[SimpleNamespace]:
    from modellink.core.launch import free_port
    port, errors = free_port(), tmp_path_factory.mktemp("front") / "stderr"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "modellink.infer.cli", "serve", "--load", str(llama), "--device", "cpu",
             "--port", str(port), "--served-model-name", "tiny", "--replicas", "2"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=file)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            found = SimpleNamespace(client=client, process=process, errors=errors, port=port)
            wait_for(found, 2)
            yield found
    finally:
        process.kill()


def wait_for(front: SimpleNamespace, ready: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert front.process.poll() is None, front.errors.read_text()
        try:
            if front.client.get("/health").json().get("ready") == ready:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(front.errors.read_text())


def samples(front: SimpleNamespace, name: str) -> dict[str, float]:
    """Return the values of a metric by replica."""
    lines = [line for line in front.client.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {line.split('"')[1]: float(line.split(" ")[-1]) for line in lines}


def workers(front: SimpleNamespace) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(front.process.pid)], capture_output=True,
                           text=True)
    return [int(line) for line in found.stdout.split()]


def post(front: SimpleNamespace, **body: Any) -> Any:
    return front.client.post("/v1/completions", json=body)


def test_concurrent_requests_are_answered(front, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)
    before = samples(front, "modellink_answers_total")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: post(front, **BODY), range(8)))
    assert {response.json()["choices"][0]["text"] for response in found} == {expected.text}
    after = samples(front, "modellink_answers_total")
    assert set(after) == {"0", "1"} and sum(after.values()) - sum(before.values()) == 8


def test_streams_and_errors_are_forwarded(front, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)
    with front.client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]" and len(events) > 5
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-1]) == expected.text
    assert post(front, prompt="a", temperature=-1).status_code == 400
    assert post(front, prompt="a", model="gpt").status_code == 404
    assert front.client.post("/v1/completions", content=b"x" * (3 << 20)).status_code == 413
    assert front.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert "<!doctype html>" in front.client.get("/").text


@pytest.mark.parametrize("streaming", [True, False])
def test_a_disconnect_cancels_the_completions_of_the_replica(front, streaming):
    before = sum(samples(front, "modellink_cancelled_total").values())
    content = json.dumps({**LONG, "prompt": ["The"] * 32, "stream": streaming}).encode()
    with socket.create_connection(("127.0.0.1", front.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        deadline = time.monotonic() + 60
        while not any(samples(front, "modellink_running").values()) and time.monotonic() < deadline:
            time.sleep(0.005)
    while sum(samples(front, "modellink_cancelled_total").values()) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sum(samples(front, "modellink_cancelled_total").values()) > before
    assert set(samples(front, "modellink_running").values()) == {0.0}


def test_requests_are_retried_if_a_replica_is_killed(front, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        found = [pool.submit(post, front, **BODY) for _ in range(10)]
        os.kill(workers(front)[0], signal.SIGKILL)
        assert {future.result().json()["choices"][0]["text"] for future in found} == {expected.text}
    deadline = time.monotonic() + 20
    while "ended with status -9" not in front.errors.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "ended with status -9" in front.errors.read_text()
    wait_for(front, 2)  # it was restarted


def test_a_stream_of_a_killed_replica_ends_with_an_error(front):
    """Afterwards, until the replicas have restarted, requests get status 503."""
    before = front.errors.read_text().count("ended with status")
    with front.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        for pid in workers(front):
            os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1][6:])["error"]["message"] == "the replica exited"
    deadline = time.monotonic() + 20
    while front.errors.read_text().count("ended with status") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    response = post(front, **BODY)
    assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
    assert front.client.get("/health").status_code == 503


def test_the_replicas_stop_with_the_server(front):
    wait_for(front, 2)
    pids = workers(front)
    front.process.send_signal(signal.SIGTERM)
    assert front.process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
