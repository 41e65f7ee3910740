# SPDX-License-Identifier: Apache-2.0
"""What clients of the server get. The openai package is the client that must work."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.usefixtures("idle_afterwards")

CLOCK = {"type": "function", "function": {"name": "clock",
                                          "parameters": {"type": "object", "properties": {}}}}
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊"}]


@pytest.fixture
def openai(server) -> Any:
    package = pytest.importorskip("openai")
    with package.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: SimpleNamespace, path: str = "/v1/completions", **body: Any) -> Any:
    return server.client.post(path, json=body)


def test_the_openai_client_completes_prompts(openai, engine, prompts):
    found = openai.completions.create(model="tiny", prompt=prompts, max_tokens=12, temperature=0)
    expected = engine.generate(prompts, max_new_tokens=12)
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in found.choices] == [one.finish_reason for one in expected]
    assert found.usage.prompt_tokens == sum(completion.prompt_tokens for completion in expected)
    assert found.usage.completion_tokens == sum(len(completion.token_ids) for completion in expected)


def test_the_openai_client_chats(openai, engine):
    found = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12, seed=3,
                                           temperature=1.3, logprobs=True, top_logprobs=2)
    (expected,) = engine.generate(CHAT, max_new_tokens=12, seed=3, temperature=1.3, top_k=0, top_logprobs=2)
    assert found.choices[0].message.content == expected.text and found.choices[0].message.role == "assistant"
    assert [entry.logprob for entry in found.choices[0].logprobs.content] == pytest.approx(expected.logprobs,
                                                                                           abs=1e-4)
    assert [len(entry.top_logprobs)
            for entry in found.choices[0].logprobs.content] == [2] * len(expected.token_ids)


def test_the_openai_client_streams(openai, engine):
    stream = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=20, temperature=0,
                                            stream=True, n=2, stream_options={"include_usage": True})
    texts, reasons, usage = ["", ""], {}, None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    (expected,) = engine.generate(CHAT, max_new_tokens=20)
    assert texts == [expected.text] * 2 and reasons == dict.fromkeys((0, 1), expected.finish_reason)
    assert usage.completion_tokens == 2 * len(expected.token_ids)
    assert usage.prompt_tokens == expected.prompt_tokens


def test_the_openai_client_lists_models(openai):
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").id == "tiny"


def test_events_follow_the_protocol(server):
    with server.client.stream("POST", "/v1/completions",
                              json={"prompt": "The", "max_tokens": 4, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] in ("length", "stop")


def test_stop_echo_and_token_ids(server, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=20, ignore_eos=True)
    stop = expected.text[6:9]
    found = post(server, prompt="The quick", max_tokens=20, temperature=0, stop=[stop], echo=True,
                 ignore_eos=True).json()
    assert found["choices"][0]["text"] == "The quick" + expected.text[:expected.text.index(stop)]
    ids = post(server, prompt=engine.tokenizer.encode("The quick"), max_tokens=20, temperature=0,
               ignore_eos=True).json()
    assert ids["choices"][0]["text"] == expected.text


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_an_echoed_prompt_has_log_probabilities(server, engine, full_logits, as_ids, count):
    text = "The quick 机器 🦊 fox"
    ids = engine.tokenizer.encode(text)
    prompt = ids if as_ids else text
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "echo": True, "logprobs": 1,
            "ignore_eos": True}
    found = post(server, **body).json()
    choice = found["choices"][0]
    (completion,) = engine.generate([ids], max_new_tokens=3, ignore_eos=True)
    ids, logprobs = [*ids, *completion.token_ids[:count]], choice["logprobs"]
    reference = full_logits(ids)[:-1]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(reference[range(len(reference)), ids[1:]].tolist(),
                                                           abs=1e-4)
    best = [max(top.values()) for top in logprobs["top_logprobs"][1:]]
    assert best == pytest.approx(reference.max(-1).values.tolist(), abs=1e-4)
    assert all(token in top and top[token] == value for token, top, value in list(zip(
        logprobs["tokens"], logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True))[1:]
               if "\ufffd" not in token)
    assert choice["text"].startswith(text)
    assert all(choice["text"][offset:].startswith(token) for token, offset in zip(
        logprobs["tokens"], logprobs["text_offset"], strict=True) if "\ufffd" not in token)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert found["usage"]["completion_tokens"] == count
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        events = [json.loads(line[6:])["choices"][0] for line in response.iter_lines()
                  if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == choice["text"]
    parts = [event["logprobs"] for event in events if event["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in logprobs} == logprobs


def test_echo_with_alternatives_for_several_prompts_and_samples(server, engine):
    found = post(server, prompt=["The quick", "a 🦊"], max_tokens=2, temperature=0, echo=True, logprobs=5,
                 n=2).json()
    first, again, *_ = found["choices"]
    assert first["logprobs"] == again["logprobs"] and len(found["choices"]) == 4
    assert all(5 <= len(top) <= 6 or "\ufffd" in "".join(top)
               for top in first["logprobs"]["top_logprobs"][1:])


def test_stop_strings_and_stop_ids_together(server, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=20, ignore_eos=True)
    body = {"prompt": "The quick", "max_tokens": 20, "temperature": 0, "ignore_eos": True,
            "stop": "no such text"}
    found = post(server, **body, stop_token_ids=[expected.token_ids[3]]).json()
    assert found["usage"]["completion_tokens"] <= 4 and found["choices"][0]["finish_reason"] == "stop"


def test_a_chat_without_max_tokens_ends_at_the_maximum_length(server, engine):
    found = post(server, "/v1/chat/completions", messages=CHAT, temperature=0, ignore_eos=True).json()
    assert found["usage"]["total_tokens"] == engine.spec.max_position_embeddings


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"temperature": 1e-30, "top_k": 5},
                                     {"top_p": 1e-300}])
def test_extreme_numbers_are_handled(server, engine, options):
    (expected,) = engine.generate("The quick", max_new_tokens=8)
    assert post(server, prompt="The quick", max_tokens=8,
                **options).json()["choices"][0]["text"] == expected.text


def test_message_parts_and_tools_reach_the_template(server, engine, monkeypatch):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    found = post(server, "/v1/chat/completions", messages=parts, max_tokens=5, temperature=0).json()
    assert found["choices"][0]["message"]["content"] == engine.generate(
        [{"role": "user", "content": "Hello"}], max_new_tokens=5)[0].text
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default",
                        "{{ tools[0].function.name }}{{ messages[0]['content'] }}")
    found = post(server, "/v1/chat/completions", messages=parts, tools=[CLOCK], max_tokens=5,
                 temperature=0).json()
    assert found["usage"]["prompt_tokens"] == len(engine.tokenizer.encode("clockHello"))


def test_unsupported_fields_with_a_neutral_value_are_accepted(server, engine):
    more = {"skip_special_tokens": True, "logit_bias": {}, "best_of": 1, "length_penalty": 1.0,
            "min_tokens": 0, "user": "me", "guided_json": None, "use_beam_search": False}
    (expected,) = engine.generate("The", max_new_tokens=5)
    assert post(server, prompt="The", max_tokens=5, temperature=0,
                **more).json()["choices"][0]["text"] == expected.text


def test_tool_calls_reach_the_template_as_objects(server, engine, monkeypatch):
    """The `openai` client sends back the arguments of a call as JSON text."""
    template = ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
                "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}")
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", template)
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "Köln"}'}}
    messages = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "12:00"}]
    found = post(server, "/v1/chat/completions", messages=messages, tools=[CLOCK], tool_choice="auto",
                 max_tokens=5)
    text = 'Grüße 🦊{"zone": "Köln"}12:00'
    assert found.status_code == 200, found.text
    assert found.json()["usage"]["prompt_tokens"] == len(engine.tokenizer.encode(text))


def test_tool_choice_none_hides_the_tools(server, engine, monkeypatch):
    monkeypatch.setitem(engine.tokenizer.chat_templates, "default", "{{ tools is none or not tools }}")
    found = post(server, "/v1/chat/completions", messages=CHAT, tools=[CLOCK], tool_choice="none",
                 max_tokens=5)
    assert found.json()["usage"]["prompt_tokens"] == len(engine.tokenizer.encode("True"))


def test_constraint_fields_of_other_servers(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"],
              "additionalProperties": False}
    for more in ({"guided_json": schema}, {"guided_json": json.dumps(schema)},
                 {"structured_outputs": {"json": schema}}):
        assert post(server, prompt="a", max_tokens=40, **more).json()["choices"][0]["text"] == '{"a": "x"}'
    for more in ({"guided_regex": "ab{3}"}, {"structured_outputs": {"regex": "ab{3}"}}):
        assert post(server, prompt="a", max_tokens=40, **more).json()["choices"][0]["text"] == "abbb"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stuck_completion_reports_length(server, monkeypatch, streaming):
    """OpenAI's clients know only `stop` and `length`."""
    pytest.importorskip("llguidance")
    from modellink.infer.constraint import Constraint

    def stuck(constraint: Any, logits: Any) -> Any:
        constraint.stuck = True
        return logits
    monkeypatch.setattr(Constraint, "mask", stuck)
    response = post(server, prompt="a", guided_regex="a+", stream=streaming)
    text = response.text.replace("data: [DONE]",
                                 "").strip().split("data: ")[-1] if streaming else response.text
    assert json.loads(text)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_disconnect_cancels_the_completion(server, paused, streaming):
    service, metrics = server.service, server.service.metrics
    cancelled, requests = metrics._counts["cancelled"], Counter(metrics._requests)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json.dumps({"prompt": "The", "max_tokens": 240, "stream": streaming,
                           "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: service.unfinished == 1 and service._inbox.empty())  # it has joined the batch
    wait_until(lambda: not service._inbox.empty())  # the cancellation is on its way
    paused.set()
    wait_until(lambda: not service.unfinished)
    assert metrics._counts["cancelled"] == cancelled + 1
    wait_until(lambda: metrics._requests - requests)
    assert metrics._requests - requests == {("/v1/completions", 200 if streaming else 499): 1}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_disconnect_before_the_first_piece_cancels_the_stream(server):
    from starlette.requests import Request

    from modellink.infer.server.app import _complete
    body = json.dumps({"prompt": "The", "max_tokens": 240, "stream": True, "ignore_eos": True}).encode()
    before = server.service.metrics._counts["cancelled"]

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: Any) -> None:
        raise OSError

    async def ask() -> None:
        scope = {"type": "http", "headers": [], "asgi": {"spec_version": "2.4"}}
        response = await _complete(server.service, Request(scope, receive), "tiny", 1000, chat=False)
        with pytest.raises(Exception):  # noqa: B017 - the class depends on the version of starlette
            await response(scope, receive, send)
        while server.service.unfinished:
            await asyncio.sleep(0.01)
    asyncio.run(ask())
    assert server.service.metrics._counts["cancelled"] == before + 1


def test_a_client_that_stops_reading_delays_nobody(server, engine):
    (expected,) = engine.generate("The quick", max_new_tokens=10)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json.dumps({"prompt": ["The"] * 8, "max_tokens": 200, "stream": True, "ignore_eos": True,
                           "logprobs": 20}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        found = post(server, prompt="The quick", max_tokens=10, temperature=0).json()
    assert found["choices"][0]["text"] == expected.text


def test_health_and_metrics(server):
    assert server.client.get("/health").json() == {"status": "ok"}
    post(server, prompt="The", max_tokens=3, ignore_eos=True)
    text = server.client.get("/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines()
              if not line.startswith("#")}
    assert values["modellink_generated_tokens_total"] >= 3 and values["modellink_running"] == 0
    assert values["modellink_time_to_first_token_seconds_count"] == values[
        'modellink_time_to_first_token_seconds_bucket{le="+Inf"}'] > 0
    assert values['modellink_http_requests_total{path="/v1/completions",status="200"}'] > 0


def test_the_page_loads_nothing_else(server):
    response = server.client.get("/")
    assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
    assert "src=" not in response.text and "@import" not in response.text


@pytest.mark.parametrize("tp", [1, 2])
def test_the_command_serves_and_stops_gracefully(llama, engine, tp):
    from modellink.core.launch import free_port
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "modellink.infer.cli", "serve", "--load", str(llama), "--device", "cpu",
         "--port", str(port), "--served-model-name", "tiny", "--tp", str(tp)],
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60,
                          transport=httpx.HTTPTransport(retries=0)) as client:
            for _ in range(1800):
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None
                    time.sleep(0.1)
            body = {"prompt": ["The quick", "Köln"], "max_tokens": 20, "temperature": 0}
            expected = [one.text for one in engine.generate(body["prompt"], max_new_tokens=20)]
            assert [choice["text"] for choice in client.post("/v1/completions",
                                                             json=body).json()["choices"]] == expected
            with client.stream("POST", "/v1/completions",
                               json={"prompt": "The", "max_tokens": 150, "stream": True,
                                                                "ignore_eos": True}) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)  # a running completion still finishes
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
