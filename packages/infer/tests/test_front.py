"""The server in front, without a model: what it imports, hands over, and does when a replica cannot start."""

from __future__ import annotations

import subprocess
import sys

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


def test_it_needs_nothing_of_the_model():
    found = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr
