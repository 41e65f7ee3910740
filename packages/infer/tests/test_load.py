# SPDX-License-Identifier: Apache-2.0
"""A server under load: many connections, large bodies, clients that stop reading or disconnect.

Every completion is right, and nothing of a finished request stays in memory. The numbers of requests are
fixed, so that a run does not depend on the speed of the machine.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import socket
import time
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.usefixtures("idle_afterwards")
CLIENTS = 8
PROMPTS = ["The", "The quick brown fox jumps over the lazy dog", "Köln: 机器学习", "🦊",
           "def add(a, b):\n    return"]
SAMPLINGS = [{"temperature": 0}, {"temperature": 1.3, "seed": 5},
             {"temperature": 0, "repetition_penalty": 1.3},
             {"temperature": 0.9, "seed": 7, "top_p": 0.8, "ignore_eos": True}]
KINDS = ["full", "several", "stream", "leave", "bad", "partial"]


@pytest.fixture(scope="module")
def expected(engine) -> dict[tuple[int, int], str]:
    """The text for each prompt and sampling, from the library."""
    return {(prompt, number): engine.generate(text, max_new_tokens=24, **{"top_k": 0, **sampling})[0].text
            for prompt, text in enumerate(PROMPTS) for number, sampling in enumerate(SAMPLINGS)}


@pytest.fixture
def submissions(server, monkeypatch) -> list[weakref.ref[Any]]:
    """Weak references to every submission and completion of the server."""
    found: list[weakref.ref[Any]] = []
    submit = server.service.submit

    def record(*args: Any, **kwargs: Any) -> Any:
        submission = submit(*args, **kwargs)
        found.extend(map(weakref.ref, (submission, *submission.completions)))
        return submission
    monkeypatch.setattr(server.service, "submit", record)
    return found


def body(prompt: int, sampling: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPTS[prompt], "max_tokens": 24, **SAMPLINGS[sampling], **more}


def http_request(content: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(content),
                                                                                          content)


def test_many_connections_and_requests(server, paused, expected):
    """Hundreds of idle connections, and ten times as many requests as may wait: each is answered or gets
    status 429."""
    limit = server.service.max_waiting
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(250)]
    refused = 0

    async def post(client: Any, number: int) -> Any:
        nonlocal refused
        response = await client.post("/v1/completions", json=body(number % 5, 0))
        refused += response.status_code == 429
        if refused == 9 * limit:
            paused.set()  # no completion finishes before this
        return response

    async def crowd() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(post(client, number) for number in range(10 * limit)))
    found = asyncio.run(crowd())
    for connection in idle:
        connection.close()
    assert Counter(response.status_code for response in found) == {200: limit, 429: 9 * limit}
    for number, response in enumerate(found):
        if response.status_code == 429:
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert response.headers["retry-after"] == "1"
        else:
            assert response.json()["choices"][0]["text"] == expected[number % 5, 0]


def test_the_limits_on_connections_and_files_follow_the_number_of_completions():
    from modellink.infer.server.run import CONNECTIONS, _connections
    assert _connections(1) == CONNECTIONS
    assert _connections(CONNECTIONS) == 4 * CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft in (hard, resource.RLIM_INFINITY) or soft > 8 * CONNECTIONS


@pytest.mark.parametrize(("headers", "parts_read"), [([(b"content-length", b"10485760")], 0), ([], 11)])
def test_no_more_of_a_large_body_is_read_than_allowed(headers, parts_read):
    from starlette.requests import Request

    from modellink.infer.server.http import read_content
    read = []

    async def receive() -> Any:
        read.append(1)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    assert asyncio.run(read_content(request, 10_000)) is None
    assert len(read) == parts_read


async def one_request(server: SimpleNamespace, client: Any, kind: str, dice: random.Random,
                      expected: dict[tuple[int, int], str]) -> str:
    """Send a request of a kind with random details, and return its outcome: right, wrong, or busy."""
    prompt, sampling = dice.randrange(len(PROMPTS)), dice.randrange(len(SAMPLINGS))
    if kind == "bad":
        content = dice.choice([b"{", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": []}',
                               b"\xff" * 50_000])
        return "right" if (await client.post("/v1/completions",
                                             content=content)).status_code == 400 else "wrong"
    if kind == "partial":
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(http_request(json.dumps(body(prompt, sampling,
                                                  stream=True)).encode())[:dice.randrange(1, 120)])
        writer.close()
        return "right"
    if kind in ("full", "several"):
        prompts = range(len(PROMPTS)) if kind == "several" else [prompt]
        request = body(prompt, sampling) | {"prompt": [PROMPTS[each] for each in prompts]}
        response = await client.post("/v1/completions", json=request)
        if response.status_code == 429:
            return "busy"
        texts = [choice["text"] for choice in response.json()["choices"]]
        return "right" if texts == [expected[each, sampling] for each in prompts] else "wrong"
    stop = dice.randrange(1, 12) if kind == "leave" else None
    async with client.stream("POST", "/v1/completions", json=body(prompt, sampling, stream=True)) as response:
        if response.status_code == 429:
            return "busy"
        lines: list[str] = []
        async for line in response.aiter_lines():
            lines += [line] if line else []
            if len(lines) == stop:
                break
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))
    if stop:
        return "right" if expected[prompt, sampling].startswith(text) else "wrong"
    return "right" if text == expected[prompt, sampling] and lines[-1] == "data: [DONE]" else "wrong"


async def run_clients(server: SimpleNamespace, expected: dict[tuple[int, int], str], rounds: int,
                      seed: int) -> Counter[str]:
    """Count the outcomes of clients that each send every kind of request `rounds` times, next to three that
    never read."""
    outcomes: Counter[str] = Counter()
    silent = []
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(http_request(json.dumps(body(0, 3, max_tokens=200, logprobs=20, stream=True,
                                                  n=2)).encode()))
        silent.append(writer)

    async def run_client(number: int) -> None:
        dice = random.Random(seed * 1000 + number)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            for _ in range(rounds):
                for kind in dice.sample(KINDS, len(KINDS)):
                    outcomes[await one_request(server, client, kind, dice, expected)] += 1
    await asyncio.gather(*(run_client(number) for number in range(CLIENTS)))
    for writer in silent:
        writer.close()
    return outcomes


@pytest.mark.parametrize("rounds", [5, pytest.param(1000, marks=pytest.mark.stress)])
def test_soak(server, expected, submissions, rounds):
    seed = int(os.environ.get("MODELLINK_TEST_SEED", "1"))
    outcomes = asyncio.run(run_clients(server, expected, rounds, seed))
    assert outcomes["wrong"] == 0 and outcomes["right"] + outcomes["busy"] == CLIENTS * len(KINDS) * rounds
    assert outcomes["right"] > CLIENTS * 2 * rounds  # bad and partial requests are always right
    deadline = time.monotonic() + 60
    while (server.service.unfinished or any(one() is not None
                                            for one in submissions)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert len(submissions) > CLIENTS * rounds and not any(one() is not None for one in submissions)
