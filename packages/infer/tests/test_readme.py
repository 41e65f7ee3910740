# SPDX-License-Identifier: Apache-2.0
"""Runs the examples of the README for the server: the curl commands and the program with the openai client.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
README = Path(__file__).parents[1] / "README.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address(engine) -> Iterator[str]:
    from modellink.core.launch import free_port
    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    app = make_app(Service(engine, max_waiting=4), name="smollm2", api_key=None, max_body=10_000)
    running = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)


def blocks(kind: str, word: str) -> list[str]:
    found = re.findall(rf"```{kind}\n(.*?)\n```", README.read_text("utf-8"), re.DOTALL)
    return [block for block in found if word in block]


def test_the_curl_commands(address):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (block,) = blocks("console", "curl")
    full, streamed = (subprocess.run([*shlex.split(line.replace(ADDRESS, address)), "-s"],
                                     capture_output=True, text=True).stdout
                       for line in block.replace("\\\n", " ").split("$ ")[1:])
    assert json.loads(full)["choices"][0]["message"]["content"]
    assert streamed.startswith('data: {"id"') and streamed.rstrip().endswith("data: [DONE]")


def test_the_openai_client(address, capsys):
    pytest.importorskip("openai")
    (block,) = blocks("python", "OpenAI")
    names: dict[str, object] = {}
    exec(block, names)
    names["ask"](f"{address}/v1")  # type: ignore[operator]
    assert capsys.readouterr().out.count(" ") > 3
    assert ADDRESS in block
