"""The server: what clients get, and that what one does wrong harms no other. The openai package is the client that must pass."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊"}]


@pytest.fixture(scope="module")
def server(engine) -> Iterator[SimpleNamespace]:
    """A server in this process, on a port of its own."""
    from modellink.core.launch import free_port
    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    service = Service(engine, most_waiting=24)
    app = make_app(service, name="tiny", api_key=None, largest_body=100_000)
    running = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield SimpleNamespace(client=client, service=service, port=port, url=f"http://127.0.0.1:{port}")
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive() and not service._thread.is_alive()


@pytest.fixture(autouse=True)
def quiet(server) -> Iterator[None]:
    """Nothing is left behind by a test."""
    yield
    deadline = time.monotonic() + 20
    while server.service.under_way and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.service.under_way == 0 and server.service.failure is None
    assert all(pool.used == 0 for pool in server.service.batch.cache.pools)


@pytest.fixture
def openai(server) -> Any:
    package = pytest.importorskip("openai")
    with package.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: SimpleNamespace, path: str = "/v1/completions", **body: Any) -> Any:
    return server.client.post(path, json=body)


def test_the_openai_client_completes(openai, engine, prompts):
    found = openai.completions.create(model="tiny", prompt=prompts, max_tokens=12, temperature=0)
    expected = engine.generate(prompts, max_new_tokens=12)
    assert [choice.text for choice in found.choices] == [answer.text for answer in expected]
    assert [choice.finish_reason for choice in found.choices] == [answer.finish_reason for answer in expected]
    assert found.usage.prompt_tokens == sum(answer.prompt_tokens for answer in expected)
    assert found.usage.completion_tokens == sum(len(answer.token_ids) for answer in expected)


def test_the_openai_client_chats(openai, engine):
    found = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12, seed=3, temperature=1.3, logprobs=True,
                                           top_logprobs=2)
    (expected,) = engine.generate(CHAT, max_new_tokens=12, seed=3, temperature=1.3, top_k=0, top_logprobs=2)
    assert found.choices[0].message.content == expected.text and found.choices[0].message.role == "assistant"
    assert [entry.logprob for entry in found.choices[0].logprobs.content] == pytest.approx(expected.logprobs, abs=1e-4)
    assert [len(entry.top_logprobs) for entry in found.choices[0].logprobs.content] == [2] * len(expected.token_ids)


def test_the_openai_client_streams(openai, engine):
    stream = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=20, temperature=0, stream=True, n=2,
                                            stream_options={"include_usage": True})
    texts, reasons, usage = ["", ""], {}, None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    (expected,) = engine.generate(CHAT, max_new_tokens=20)
    assert texts == [expected.text] * 2 and reasons == dict.fromkeys((0, 1), expected.finish_reason)
    assert usage.completion_tokens == 2 * len(expected.token_ids) and usage.prompt_tokens == expected.prompt_tokens


def test_the_openai_client_lists_models(openai):
    assert [model.id for model in openai.models.list()] == ["tiny"] and openai.models.retrieve("tiny").id == "tiny"


def test_events_are_those_of_the_protocol(server):
    with server.client.stream("POST", "/v1/completions", json={"prompt": "The", "max_tokens": 4, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] in ("length", "stop")


def test_stops_echo_and_tokens(server, engine):
    (whole,) = engine.generate("The quick", max_new_tokens=20, ignore_eos=True)
    stop = whole.text[6:9]
    found = post(server, prompt="The quick", max_tokens=20, temperature=0, stop=[stop], echo=True, ignore_eos=True).json()
    assert found["choices"][0]["text"] == "The quick" + whole.text[:whole.text.index(stop)]
    ids = post(server, prompt=engine.tokenizer.encode("The quick"), max_tokens=20, temperature=0, ignore_eos=True).json()
    assert ids["choices"][0]["text"] == whole.text


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_an_echoed_prompt_has_its_log_probabilities(server, engine, full_logits, as_ids, count):
    text = "The quick 机器 🦊 fox"
    ids = engine.tokenizer.encode(text)
    prompt = ids if as_ids else text
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "echo": True, "logprobs": 1, "ignore_eos": True}
    found = post(server, **body).json()
    choice = found["choices"][0]
    (answer,) = engine.generate([ids], max_new_tokens=3, ignore_eos=True)
    ids, told = [*ids, *answer.token_ids[:count]], choice["logprobs"]
    whole = full_logits(ids)[:-1]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(whole[range(len(whole)), ids[1:]].tolist(), abs=1e-4)
    assert [max(top.values()) for top in told["top_logprobs"][1:]] == pytest.approx(whole.max(-1).values.tolist(), abs=1e-4)
    assert all(token in top and top[token] == value for token, top, value in list(zip(
        told["tokens"], told["top_logprobs"], told["token_logprobs"], strict=True))[1:] if "\ufffd" not in token)
    assert choice["text"].startswith(text)
    assert all(choice["text"][offset:].startswith(token) for token, offset in zip(
        told["tokens"], told["text_offset"], strict=True) if "\ufffd" not in token)
    assert told["text_offset"] == sorted(told["text_offset"]) and found["usage"]["completion_tokens"] == count
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        events = [json.loads(line[6:])["choices"][0] for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == choice["text"]
    parts = [event["logprobs"] for event in events if event["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in told} == told


def test_the_prompts_alternatives_and_the_answers_come_in_one_batch(server, engine):
    found = post(server, prompt=["The quick", "a 🦊"], max_tokens=2, temperature=0, echo=True, logprobs=5, n=2).json()
    first, again, *_ = found["choices"]
    assert first["logprobs"] == again["logprobs"] and len(found["choices"]) == 4
    assert all(5 <= len(top) <= 6 or "\ufffd" in "".join(top) for top in first["logprobs"]["top_logprobs"][1:])


def test_stop_strings_and_stop_ids_together(server, engine):
    (whole,) = engine.generate("The quick", max_new_tokens=20, ignore_eos=True)
    body = {"prompt": "The quick", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stop": "no such text"}
    found = post(server, **body, stop_token_ids=[whole.token_ids[3]]).json()
    assert found["usage"]["completion_tokens"] <= 4 and found["choices"][0]["finish_reason"] == "stop"


def test_a_chat_ends_where_there_is_no_more_room(server, engine):
    found = post(server, "/v1/chat/completions", messages=CHAT, temperature=0, ignore_eos=True).json()
    assert found["usage"]["total_tokens"] == engine.spec.max_position_embeddings


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"temperature": 1e-30, "top_k": 5}, {"top_p": 1e-300}])
def test_extreme_numbers_harm_nobody(server, engine, options):
    (expected,) = engine.generate("The quick", max_new_tokens=8)
    assert post(server, prompt="The quick", max_tokens=8, **options).json()["choices"][0]["text"] == expected.text


def test_parts_of_a_message_and_tools_reach_the_template(server, engine, monkeypatch):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    found = post(server, "/v1/chat/completions", messages=parts, max_tokens=5, temperature=0).json()
    assert found["choices"][0]["message"]["content"] == engine.generate(
        [{"role": "user", "content": "Hello"}], max_new_tokens=5)[0].text
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", "{{ tools[0].function.name }}{{ messages[0]['content'] }}")
    found = post(server, "/v1/chat/completions", messages=parts, tools=[CLOCK], max_tokens=5, temperature=0).json()
    assert found["usage"]["prompt_tokens"] == len(engine.tokenizer.encode("clockHello"))


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"{", 400, "not JSON"), (b"[]", 400, "not a JSON object"), (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is not"),
    (b"[" * 90_000, 400, "JSON"), (b"\xff\xfe", 400, "not JSON"), ({"prompt": []}, 400, "no prompt"), ({}, 400, "no prompt"),
    ({"prompt": "a", "model": "gpt"}, 404, "no model 'gpt'"), ({"prompt": [400]}, 400, "token id 400"),
    ({"prompt": [5] * 300}, 400, "longest sequence is 256"), ({"prompt": "a", "max_tokens": 1000}, 400, "use at most"),
    ({"prompt": "a", "max_tokens": -1}, 400, "at least 1"), ({"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
    ({"prompt": "a", "temperature": "hot"}, 400, "must be of type"), ({"prompt": "a", "n": 1000}, 400, "is the most"),
    ({"prompt": "a", "n": 0}, 400, "0 answers"), ({"prompt": "a", "stop": [None]}, 400, "no text"),
    ({"prompt": "a", "use_beam_search": True}, 400, "not supported"), ({"prompt": "a", "best_of": 3}, 400, "not supported"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "not supported"), ({"prompt": "a", "logprobs": 50}, 400, "20 is the most"),
    ({"prompt": "a", "max_tokens": 0}, 400, "at least 1"), (b'{"prompt": "a\\ud800"}', 400, "not Unicode"),
    (b'{"prompt": "a", "temperature": 1%s}' % (b"0" * 400), 400, "401 digits"),
    ({"prompt": "a", "repetition_penalty": 1e-30}, 400, "repetition_penalty is 1e-30"),
    ({"prompt": "a", "stop": ["a"] * 65}, 400, "64 is the most"),
    ({"prompt": "a" * 200_000}, 413, "larger than 100000")])
def test_a_bad_body_gets_a_proper_error(server, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post("/v1/completions", content=content)
    assert response.status_code == status and message in response.json()["error"]["message"]


@pytest.mark.parametrize(("more", "param", "message"), [
    ({"max_tokens": 1000}, "max_tokens", "use at most"), ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"top_p": 2}, "top_p", "top_p is 2"), ({"top_p": 0}, "top_p", "top_p is 0"), ({"top_k": -7}, "top_k", "top_k is -7"),
    ({"min_p": 3}, "min_p", "min_p is 3"), ({"frequency_penalty": 1000}, "frequency_penalty", "frequency_penalty is 1000"),
    ({"seed": -4}, "seed", "seed is -4"), ({"n": 0}, "n", "0 answers"),
    ({"n": 25}, "n", "24 is the most"), ({"prompt": ["a"] * 5, "n": 5}, "n", "24 is the most"),
    ({"logprobs": 21}, "logprobs", "20 is the most"),
    ({"stop": ""}, "stop", "stop string is empty"), ({"stop_token_ids": ["a"]}, "stop_token_ids", "no token id"),
    ({"prompt": [400]}, "prompt", "token id 400"), ({"prompt": [5] * 300}, "prompt", "longest sequence"),
    ({"response_format": {"type": "regex", "regex": "("}}, "response_format", "no answer can be made"),
    ({"guided_regex": "a", "guided_json": {}}, "response_format", "one schema or expression"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs", "choice in structured_outputs is not supported"),
    *(({name: value}, name, f"{name} is not supported") for name, value in {
        "guided_choice": ["a"], "guided_grammar": "x", "min_tokens": 3, "bad_words": ["a"], "allowed_token_ids": [1],
        "include_stop_str_in_output": True, "skip_special_tokens": False, "functions": [{"name": "f"}], "tools": [{}],
        "add_special_tokens": False, "truncate_prompt_tokens": 5, "best_of": True, "suffix": "x"}.items())])
def test_an_error_names_the_field(server, more, param, message):
    response = post(server, **{"prompt": "a"} | more)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], message in error["message"], "--" in error["message"]) == (param, True, False), error


@pytest.mark.parametrize(("more", "param", "message"), [
    ({"max_completion_tokens": 1000}, "max_completion_tokens", "use at most"), ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "longest sequence"),
    ({"tool_choice": "required"}, "tool_choice", "cannot be forced"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "cannot be forced"),
    ({"continue_final_message": True}, "continue_final_message", "is not supported"), ({"tools": ["clock"]}, "tools", "tool 0"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools", "no JSON schema"),
    *(({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages", message) for calls, message in (
        ("clock", "no list of"), ([5], "no list of"), ([{"function": {}}], "no list of"), ([{"function": "f"}], "no list of"),
        ([{"function": {"name": "f", "arguments": "{"}}], "the arguments of f"),
        ([{"function": {"name": "f", "arguments": "[]"}}], "the arguments of f"),
        ([{"function": {"name": "f", "arguments": 5}}], "the arguments of f")))])
def test_an_error_of_a_chat_names_the_field(server, more, param, message):
    response = post(server, "/v1/chat/completions", **{"messages": CHAT} | more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param and message in response.json()["error"]["message"]


def test_what_does_not_fit_into_the_cache_is_told_by_field(server, monkeypatch):
    for pool in server.service.batch.cache.pools:
        monkeypatch.setattr(pool, "pages", 1)
    error = post(server, prompt="a", max_tokens=100).json()["error"]
    assert error["param"] == "max_tokens" and "does not fit into a cache of 32" in error["message"]


def test_fields_that_ask_for_nothing_are_taken(server, engine):
    more = {"skip_special_tokens": True, "logit_bias": {}, "best_of": 1, "length_penalty": 1.0, "min_tokens": 0, "user": "me",
            "guided_json": None, "use_beam_search": False}
    (expected,) = engine.generate("The", max_new_tokens=5)
    assert post(server, prompt="The", max_tokens=5, temperature=0, **more).json()["choices"][0]["text"] == expected.text


def test_calls_of_functions_reach_the_template_as_objects(server, engine, monkeypatch):
    """As the `openai` client sends back what a model called: the arguments are a JSON text."""
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", "{% for m in messages %}{{ m.content }}"
                        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}")
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "Köln"}'}}
    messages = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "12:00"}]
    found = post(server, "/v1/chat/completions", messages=messages, tools=[CLOCK], tool_choice="auto", max_tokens=5)
    text = 'Grüße 🦊{"zone": "Köln"}12:00'
    assert found.status_code == 200, found.text
    assert found.json()["usage"]["prompt_tokens"] == len(engine.tokenizer.encode(text))


def test_no_tools_reach_the_template_where_none_is_chosen(server, engine, monkeypatch):
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", "{{ tools is none or not tools }}")
    found = post(server, "/v1/chat/completions", messages=CHAT, tools=[CLOCK], tool_choice="none", max_tokens=5)
    assert found.json()["usage"]["prompt_tokens"] == len(engine.tokenizer.encode("True"))


def test_fields_of_other_servers_that_an_answer_keeps_to(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    for more in ({"guided_json": schema}, {"guided_json": json.dumps(schema)}, {"structured_outputs": {"json": schema}}):
        assert post(server, prompt="a", max_tokens=40, **more).json()["choices"][0]["text"] == '{"a": "x"}'
    for more in ({"guided_regex": "ab{3}"}, {"structured_outputs": {"regex": "ab{3}"}}):
        assert post(server, prompt="a", max_tokens=40, **more).json()["choices"][0]["text"] == "abbb"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_is_stuck_was_cut(server, monkeypatch, streaming):
    """OpenAI's clients know `stop` and `length`."""
    pytest.importorskip("llguidance")
    from modellink.infer.constraint import Constraint

    def stuck(constraint: Any, logits: Any) -> Any:
        constraint.stuck = True
        return logits
    monkeypatch.setattr(Constraint, "narrow", stuck)
    response = post(server, prompt="a", guided_regex="a+", stream=streaming)
    text = response.text.replace("data: [DONE]", "").strip().split("data: ")[-1] if streaming else response.text
    assert json.loads(text)["choices"][0]["finish_reason"] == "length"


def test_what_is_counted_is_bounded_by_the_routes(server):
    for number in range(50):
        server.client.get(f"/v1/models/{number}")
        server.client.get(f"/nothing/{number}")
        server.client.put(f"/v1/models/{number}")
    paths = {line.split('path="')[1].split('"')[0] for line in server.client.get("/metrics").text.splitlines()
             if line.startswith("modellink_http_requests_total{")}
    assert paths <= {"other", "/", "/health", "/metrics", "/v1/models", "/v1/models/{wanted:path}", "/v1/completions",
                     "/v1/chat/completions"} and "/v1/models/{wanted:path}" in paths


@pytest.mark.parametrize(("body", "message"), [
    ({}, "no messages"), ({"messages": ["a"]}, "message 0"), ({"messages": [{"role": "user", "content": 5}]}, "is no text"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "not Unicode"),
    ({"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": False}}, "the server says itself"),
    ({"messages": CHAT, "top_logprobs": 2}, "needs logprobs"), ({"messages": CHAT, "stream": "yes"}, "type bool")])
def test_a_bad_chat_gets_a_proper_error(server, body, message):
    response = server.client.post("/v1/chat/completions", content=json.dumps(body))
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_large_body_without_its_length_is_cut_off(server):
    response = server.client.post("/v1/completions", content=(b"x" * 10_000 for _ in range(1000)))
    assert response.status_code == 413


def test_what_is_not_there(server):
    assert server.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.client.get("/v1/completions").status_code == 405
    assert server.client.get("/docs").status_code == 404


def test_too_many_requests_get_429_and_harm_no_other(server, engine):
    async def crowd() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json={
                "prompt": "The quick", "max_tokens": 30, "temperature": 0, "ignore_eos": True}) for _ in range(60)))
    found = asyncio.run(crowd())
    (expected,) = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)
    good = [response.json()["choices"][0]["text"] for response in found if response.status_code == 200]
    busy = [response for response in found if response.status_code == 429]
    assert len(good) + len(busy) == 60 and good and busy and set(good) == {expected.text}
    assert busy[0].json()["error"]["type"] == "rate_limit_error" and busy[0].headers["retry-after"] == "1"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_leaves_the_batch(server, streaming):
    metrics = server.service.metrics
    before, told = metrics._counts["cancelled"], dict(metrics._requests)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json.dumps({"prompt": "The", "max_tokens": 240, "stream": streaming, "ignore_eos": True}).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        while not server.service.batch.running:
            time.sleep(0.005)
    deadline = time.monotonic() + 20
    while server.service.under_way and time.monotonic() < deadline:
        time.sleep(0.01)
    assert metrics._counts["cancelled"] == before + 1
    while not (new := metrics._requests - Counter(told)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert new == {("/v1/completions", 200 if streaming else 499): 1}


def test_a_client_that_goes_before_the_first_piece_leaves_the_batch(server):
    from starlette.requests import Request

    from modellink.infer.server.app import _answer
    body = json.dumps({"prompt": "The", "max_tokens": 240, "stream": True, "ignore_eos": True}).encode()
    before = server.service.metrics._counts["cancelled"]

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: Any) -> None:
        raise OSError

    async def ask() -> None:
        scope = {"type": "http", "headers": [], "asgi": {"spec_version": "2.4"}}
        response = await _answer(server.service, Request(scope, receive), "tiny", 1000, chat=False)
        with pytest.raises(Exception):  # noqa: B017 - another one in each version of starlette
            await response(scope, receive, send)
        while server.service.under_way:
            await asyncio.sleep(0.01)
    asyncio.run(ask())
    assert server.service.metrics._counts["cancelled"] == before + 1


def test_a_client_that_stops_reading_holds_back_nobody(server, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=10)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json.dumps({"prompt": ["The"] * 8, "max_tokens": 200, "stream": True, "ignore_eos": True, "logprobs": 20}).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        found = post(server, prompt="The quick", max_tokens=10, temperature=0).json()
    assert found["choices"][0]["text"] == expected.text


def test_health_and_metrics(server):
    assert server.client.get("/health").json() == {"status": "ok"}
    post(server, prompt="The", max_tokens=3, ignore_eos=True)
    text = server.client.get("/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values["modellink_generated_tokens_total"] >= 3 and values["modellink_running"] == 0
    assert values["modellink_time_to_first_token_seconds_count"] == values[
        'modellink_time_to_first_token_seconds_bucket{le="+Inf"}'] > 0
    assert values['modellink_http_requests_total{path="/v1/completions",status="200"}'] > 0


def test_the_page_is_whole_in_itself(server):
    response = server.client.get("/")
    assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
    assert "src=" not in response.text and "@import" not in response.text


@pytest.mark.parametrize("key", ["sesame", "Schlüssel"])
def test_a_key_is_asked_for(engine, key):
    from starlette.testclient import TestClient

    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    app = make_app(Service(engine, most_waiting=4), name="tiny", api_key=key, largest_body=1000)
    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer no"}).json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
        assert client.get("/health").status_code == 200


def test_no_host_gets_around_the_key(engine):
    """A URL is made of the client's Host, or of the server's name; neither says what is routed."""
    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    app = make_app(Service(engine, most_waiting=4), name="tiny", api_key="sesame", largest_body=1000)
    said: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models", "query_string": b"",
             "headers": [(b"host", b"x/foo")], "server": ("x/foo", 80)}
    asyncio.run(app(scope, receive, send))
    assert said[0]["status"] == 401


@pytest.mark.parametrize("tp", [1, 2])
def test_the_command_serves_and_ends_gracefully(llama, engine, tp):
    from modellink.core.launch import free_port
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "modellink.infer.cli", "serve", "--load", str(llama), "--device", "cpu", "--port", str(port),
         "--served-model-name", "tiny", "--tp", str(tp)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, transport=httpx.HTTPTransport(retries=0)) as client:
            for _ in range(1800):
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None
                    time.sleep(0.1)
            body = {"prompt": ["The quick", "Köln"], "max_tokens": 20, "temperature": 0}
            expected = [answer.text for answer in engine.generate(body["prompt"], max_new_tokens=20)]
            assert [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]] == expected
            with client.stream("POST", "/v1/completions", json={"prompt": "The", "max_tokens": 150, "stream": True,
                                                                "ignore_eos": True}) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)  # an answer that is under way comes to its end
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
