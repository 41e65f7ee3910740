# SPDX-License-Identifier: Apache-2.0
"""What the server refuses, and with which error; API keys."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("idle_afterwards")
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊"}]


def post(server: SimpleNamespace, path: str = "/v1/completions", **body: Any) -> Any:
    return server.client.post(path, json=body)


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"{", 400, "not JSON"), (b"[]", 400, "not a JSON object"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is not"), (b"[" * 90_000, 400, "JSON"),
    (b"\xff\xfe", 400, "not JSON"), ({"prompt": []}, 400, "no prompt"), ({}, 400, "no prompt"),
    ({"prompt": "a", "model": "gpt"}, 404, "unknown model 'gpt'"), ({"prompt": [400]}, 400, "token id 400"),
    ({"prompt": [5] * 300}, 400, "maximum length is 256"),
    ({"prompt": "a", "max_tokens": 1000}, 400, "use at most"),
    ({"prompt": "a", "max_tokens": -1}, 400, "at least 1"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature: -1.0 is out of range"),
    ({"prompt": "a", "temperature": "hot"}, 400, "must be of type"),
    ({"prompt": "a", "n": 1000}, 400, "n is 1000"), ({"prompt": "a", "n": 0}, 400, "n is 0"),
    ({"prompt": "a", "stop": [None]}, 400, "not a string"),
    ({"prompt": "a", "use_beam_search": True}, 400, "not supported"),
    ({"prompt": "a", "best_of": 3}, 400, "not supported"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "not supported"),
    ({"prompt": "a", "logprobs": 50}, 400, "between 0 and 20"),
    ({"prompt": "a", "max_tokens": 0}, 400, "at least 1"), (b'{"prompt": "a\\ud800"}', 400, "not Unicode"),
    (b'{"prompt": "a", "temperature": 1%s}' % (b"0" * 400), 400, "401 digits"),
    ({"prompt": "a", "repetition_penalty": 1e-30}, 400, "repetition_penalty: 1e-30 is out of range"),
    ({"prompt": "a", "stop": ["a"] * 65}, 400, "at most 64"),
    ({"prompt": "a" * 200_000}, 413, "larger than 100000")])
def test_a_bad_body_gets_an_error(server, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post("/v1/completions", content=content)
    assert response.status_code == status and message in response.json()["error"]["message"]


@pytest.mark.parametrize(("more", "param", "message"), [
    ({"max_tokens": 1000}, "max_tokens", "use at most"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens: -1 is out of range"),
    ({"top_p": 2}, "top_p", "top_p: 2.0 is out of range"),
    ({"top_p": 0}, "top_p", "top_p: 0 is out of range"),
    ({"top_k": -7}, "top_k", "top_k: -7 is out of range"),
    ({"min_p": 3}, "min_p", "min_p: 3.0 is out of range"),
    ({"frequency_penalty": 1000}, "frequency_penalty", "frequency_penalty: 1000.0 is out of range"),
    ({"seed": -4}, "seed", "seed: -4 is out of range"), ({"n": 0}, "n", "n is 0"),
    ({"n": 25}, "n", "1 to 24 completions"), ({"prompt": ["a"] * 5, "n": 5}, "n", "1 to 24 completions"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20"), ({"stop": ""}, "stop", "stop string is empty"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "not a token id"),
    ({"prompt": [400]}, "prompt", "token id 400"), ({"prompt": [5] * 300}, "prompt", "maximum length"),
    ({"response_format": {"type": "regex", "regex": "("}}, "response_format",
     "response_format: invalid or not supported"),
    ({"guided_regex": "a", "guided_json": {}}, "response_format", "only one schema or expression"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs",
     "choice in structured_outputs is not supported"),
    *(({name: value}, name, f"{name} is not supported") for name, value in {
        "guided_choice": ["a"], "guided_grammar": "x", "min_tokens": 3, "bad_words": ["a"],
        "allowed_token_ids": [1], "include_stop_str_in_output": True, "skip_special_tokens": False,
        "functions": [{"name": "f"}], "tools": [{}], "add_special_tokens": False, "truncate_prompt_tokens": 5,
        "best_of": True, "suffix": "x"}.items())])
def test_an_error_names_the_field(server, more, param, message):
    response = post(server, **{"prompt": "a"} | more)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], message in error["message"], "--" in error["message"]) == (param, True,
                                                                                       False), error


@pytest.mark.parametrize(("more", "param", "message"), [
    ({"max_completion_tokens": 1000}, "max_completion_tokens", "use at most"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "maximum length"),
    ({"tool_choice": "required"}, "tool_choice", "forced calls are not supported"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
     "forced calls are not supported"), ({"continue_final_message": True}, "continue_final_message",
                                         "is not supported"), ({"tools": ["clock"]}, "tools", "tool 0"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools",
     "not a JSON schema"),
    *(({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages", message) for calls,
      message in (
        ("clock", "not a list of"), ([5], "not a list of"), ([{"function": {}}], "not a list of"),
        ([{"function": "f"}], "not a list of"),
        ([{"function": {"name": "f", "arguments": "{"}}], "the arguments of f"),
        ([{"function": {"name": "f", "arguments": "[]"}}], "the arguments of f"),
        ([{"function": {"name": "f", "arguments": 5}}], "the arguments of f")))])
def test_an_error_of_a_chat_names_the_field(server, more, param, message):
    response = post(server, "/v1/chat/completions", **{"messages": CHAT} | more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param and message in response.json()["error"]["message"]


@pytest.mark.parametrize(("body", "message"), [
    ({}, "no messages"), ({"messages": ["a"]}, "message 0"),
    ({"messages": [{"role": "user", "content": 5}]}, "is not text"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "not Unicode"),
    ({"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": False}},
     "must not set add_generation_prompt"), ({"messages": CHAT, "top_logprobs": 2}, "needs logprobs"),
    ({"messages": CHAT, "stream": "yes"}, "type bool")])
def test_a_bad_chat_gets_an_error(server, body, message):
    response = server.client.post("/v1/chat/completions", content=json.dumps(body))
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_request_that_exceeds_the_cache_names_the_field(server, monkeypatch):
    for pool in server.service.batch.cache.pools:
        monkeypatch.setattr(pool, "pages", 1)
    error = post(server, prompt="a", max_tokens=100).json()["error"]
    assert error["param"] == "max_tokens" and "does not fit into a cache of 32" in error["message"]


def test_a_large_body_without_content_length_is_refused(server):
    response = server.client.post("/v1/completions", content=(b"x" * 10_000 for _ in range(1000)))
    assert response.status_code == 413


def test_unknown_paths_and_methods(server):
    assert server.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.client.get("/v1/completions").status_code == 405
    assert server.client.get("/docs").status_code == 404


def test_metrics_have_a_fixed_number_of_paths(server):
    for number in range(50):
        server.client.get(f"/v1/models/{number}")
        server.client.get(f"/nothing/{number}")
        server.client.put(f"/v1/models/{number}")
    paths = {line.split('path="')[1].split('"')[0] for line in server.client.get("/metrics").text.splitlines()
             if line.startswith("modellink_http_requests_total{")}
    assert paths <= {"other", "/", "/health", "/metrics", "/v1/models", "/v1/models/{wanted:path}",
                     "/v1/completions", "/v1/chat/completions"} and "/v1/models/{wanted:path}" in paths


@pytest.mark.parametrize("key", ["sesame", "Schlüssel"])
def test_the_api_key_is_checked(engine, key):
    from starlette.testclient import TestClient

    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    app = make_app(Service(engine, max_waiting=4), name="tiny", api_key=key, max_body=1000)
    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 401
        refused = client.get("/v1/models", headers={"Authorization": "Bearer no"})
        assert refused.json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models",
                          headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
        assert client.get("/health").status_code == 200


def test_the_host_header_does_not_bypass_the_api_key(engine):
    """A URL contains the client's Host header or the server's name, and routing uses neither."""
    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    app = make_app(Service(engine, max_waiting=4), name="tiny", api_key="sesame", max_body=1000)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models",
             "query_string": b"", "headers": [(b"host", b"x/foo")], "server": ("x/foo", 80)}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401
