"""A server under load: many connections, large bodies, clients that stop reading or go; no wrong answer, memory is flat."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
WAITING = 24  # answers under way at most
PIECE = 9 << 20  # bytes of memory that a run may add
PROMPTS = ["The", "The quick brown fox jumps over the lazy dog", "Köln: 机器学习", "🦊", "def add(a, b):\n    return"]
WAYS = [{"temperature": 0}, {"temperature": 1.3, "seed": 5}, {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.9, "seed": 7, "top_p": 0.8, "ignore_eos": True}]


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory) -> Iterator[SimpleNamespace]:
    from modellink.core.launch import free_port
    port, errors = free_port(), tmp_path_factory.mktemp("server") / "stderr"
    process = subprocess.Popen(
        [sys.executable, "-m", "modellink.infer.cli", "serve", "--load", str(llama), "--device", "cpu", "--port", str(port),
         "--served-model-name", "tiny", "--max-waiting", str(WAITING), "--cache-tokens", "2048"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        stderr=errors.open("w"))
    try:
        found = SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, process=process, seen=psutil.Process(process.pid))
        for _ in range(1200):
            try:
                httpx.get(f"{found.url}/health")
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in errors.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def expected(engine) -> dict[tuple[int, int], str]:
    """What each prompt gets each way, from the library."""
    return {(place, way): engine.generate(prompt, max_new_tokens=24, **{"top_k": 0, **WAYS[way]})[0].text
            for place, prompt in enumerate(PROMPTS) for way in range(len(WAYS))}


def body(place: int, way: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPTS[place], "max_tokens": 24, **WAYS[way], **more}


def request(content: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)


def metric(server: SimpleNamespace, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split(" ")[1]) for line in lines if line.startswith(f"modellink_{name} "))


def settle(server: SimpleNamespace) -> None:
    """Wait until nothing is under way."""
    deadline = time.monotonic() + 60
    while metric(server, "running") + metric(server, "waiting") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (metric(server, "running"), metric(server, "waiting"), metric(server, "cache_pages_used")) == (0, 0, 0)


def test_five_hundred_connections(server, expected):
    """Those that only hold a connection, and requests on more: each gets its answer or is told to come again."""
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(250)]

    async def crowd() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body(index % 5, 0)) for index in range(250)))
    found = asyncio.run(crowd())
    for connection in idle:
        connection.close()
    assert {response.status_code for response in found} == {200, 429}
    for index, response in enumerate(found):
        assert response.status_code != 200 or response.json()["choices"][0]["text"] == expected[index % 5, 0]
    settle(server)


def test_large_bodies_take_no_memory(server):
    before = server.seen.memory_info().rss
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10485760\r\n\r\n")
            assert b"413" in connection.recv(1000)
    assert server.seen.memory_info().rss - before < PIECE


async def _one(server: SimpleNamespace, client: Any, dice: random.Random, expected: dict[tuple[int, int], str],
               seen: Counter[str]) -> None:
    """One random request; `seen` counts what came of it."""
    place, way = dice.randrange(len(PROMPTS)), dice.randrange(len(WAYS))
    kind = dice.choice(["whole", "stream", "stream", "go", "bad", "half", "many"])
    if kind == "whole":
        response = await client.post("/v1/completions", json=body(place, way))
        right = response.status_code == 200 and response.json()["choices"][0]["text"] == expected[place, way]
        seen["right" if right else "busy" if response.status_code == 429 else "wrong"] += 1
    elif kind == "many":
        response = await client.post("/v1/completions", json=body(place, way, prompt=PROMPTS))
        texts = [choice["text"] for choice in response.json()["choices"]] if response.status_code == 200 else []
        right = texts == [expected[each, way] for each in range(len(PROMPTS))]
        seen["right" if right else "busy" if response.status_code == 429 else "wrong"] += 1
    elif kind in ("stream", "go"):
        stop = dice.randrange(1, 12) if kind == "go" else None
        async with client.stream("POST", "/v1/completions", json=body(place, way, stream=True)) as response:
            if response.status_code != 200:
                seen["busy" if response.status_code == 429 else "wrong"] += 1
                return
            lines = []
            async for line in response.aiter_lines():
                lines += [line] if line else []
                if len(lines) == stop:
                    break
            texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
            text = expected[place, way]
            right = text.startswith("".join(texts)) if stop else "".join(texts) == text and lines[-1] == "data: [DONE]"
            seen[("gone" if stop else "right") if right else "wrong"] += 1
    elif kind == "bad":
        content = dice.choice([b"{", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": []}', b"\xff" * 50_000])
        seen["refused" if (await client.post("/v1/completions", content=content)).status_code == 400 else "wrong"] += 1
    else:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request(json.dumps(body(place, way, stream=True)).encode())[:dice.randrange(1, 120)])
        await asyncio.sleep(dice.random() / 20)
        writer.close()
        seen["half"] += 1


async def _run(server: SimpleNamespace, seconds: float, expected: dict[tuple[int, int], str], seed: int) -> Counter[str]:
    """Ten clients at random, and three that ask for streams and read nothing."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    deaf = []
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(request(json.dumps(body(0, 3, max_tokens=200, logprobs=20, stream=True, n=2)).encode()))
        deaf.append(writer)

    async def client_of(number: int) -> None:
        dice = random.Random(seed * 1000 + number)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            while time.monotonic() < end:
                await _one(server, client, dice, expected, seen)
    await asyncio.gather(*(client_of(number) for number in range(10)))
    for writer in deaf:
        writer.close()
    return seen


@pytest.mark.parametrize("seconds", [60, pytest.param(1200, marks=pytest.mark.stress)])
def test_soak(server, expected, seconds):
    seed = int(os.environ.get("MODELLINK_TEST_SEED", random.randrange(1 << 20)))
    print("seed", seed)
    asyncio.run(_run(server, seconds / 4, expected, seed))  # pages of the cache and of the allocator are touched
    settle(server)
    before = server.seen.memory_info().rss
    seen = asyncio.run(_run(server, 3 * seconds / 4, expected, seed + 1))
    settle(server)
    more = server.seen.memory_info().rss - before
    print(dict(seen), f"memory {before / 1e6:.0f} MB, {more / 1e6:+.1f} MB")
    assert seen["wrong"] == 0 and all(seen[kind] for kind in ("right", "gone", "refused", "half")), seen
    assert more < PIECE
