# SPDX-License-Identifier: Apache-2.0
"""Constrained completions of a model whose unconstrained output is noise."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch

from modellink.kernels.errors import ModelLinkError

pytest.importorskip("llguidance")
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "n", "ok", "tags"],
          "properties": {
    "name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99},
    "ok": {"type": "boolean"}, "tags": {"type": "array", "maxItems": 2,
                                        "items": {"enum": ["fox", "Köln", "🦊"]}}}}
SAMPLED = {"temperature": 1.7, "top_k": 0, "max_new_tokens": 150}


def matches(text: str) -> bool:
    value = json.loads(text)
    return (list(value) == ["name", "n", "ok", "tags"] and isinstance(value["name"], str)
            and len(value["name"]) <= 8
            and value["n"] in range(100) and isinstance(value["ok"], bool) and len(value["tags"]) <= 2
            and set(value["tags"]) <= {"fox", "Köln", "🦊"})


@pytest.mark.parametrize("seed", range(8))
def test_samples_match_a_schema(engine, seed):
    schema = SCHEMA if seed % 2 else json.dumps(SCHEMA)
    for completion in engine.generate(["The", "Köln"], json_schema=schema, seed=seed, **SAMPLED):
        assert completion.finish_reason == "stop" and matches(completion.text), completion.text


@pytest.mark.parametrize("expression", [r"[0-9]{3}-[a-f]{2}", r"(yes|no), (fox|dog)", r"🦊+!",
                                        r"[0-9]+(\.[0-9]+)?"])
def test_completions_match_an_expression(engine, expression):
    for options in ({"seed": 1, **SAMPLED}, {"max_new_tokens": 150},
                    {"seed": 2, "ignore_eos": True, **SAMPLED}):
        (completion,) = engine.generate("The", regex=expression, **options)
        pattern = re.compile(expression)
        assert completion.finish_reason in ("stop", "length")
        assert pattern.fullmatch(completion.text) if completion.finish_reason == "stop" else completion.text


def test_unconstrained_requests_in_the_batch_are_not_affected(engine, prompts):
    free = engine.requests(prompts, max_new_tokens=30)
    bound = engine.requests(["The", "🦊"], max_new_tokens=60, json_schema=SCHEMA)
    mixed = [request for pair in zip(free, [*bound, *bound, *bound], strict=True) for request in pair]
    found = engine.complete(mixed)
    assert found[::2] == engine.complete(free) and found[1:5:2] == engine.complete(bound)


def test_max_new_tokens_cuts_a_constrained_completion(engine):
    (completion,) = engine.generate("The", json_schema=SCHEMA, seed=3, temperature=1.5, max_new_tokens=6)
    assert completion.finish_reason == "length" and completion.text.startswith('{"name"')


def test_an_end_token_is_allowed_only_where_the_grammar_may_end(engine, monkeypatch):
    """Even if it is always the most likely token."""
    from modellink.infer.constraint import Constraint
    constraint = Constraint(engine.tokenizer, engine.requests("a", regex="fox+")[0].grammar,
                            frozenset({2, 0}))
    wanted = torch.zeros(engine.spec.vocab_size)
    wanted[2] = 9.0
    assert constraint.mask(wanted)[2] == -torch.inf
    for token in engine.tokenizer.encode("fox", add_special_tokens=False):
        constraint.accept(token)
    assert constraint.mask(wanted)[2] == 9.0 and not constraint.done


def test_a_broken_grammar_ends_only_its_own_completion(engine, monkeypatch):
    from modellink.infer import constraint
    # breaks the matcher
    monkeypatch.setattr(constraint.Constraint, "accept", lambda self, token: self._matcher.consume_token(0))
    bound, free = engine.complete([*engine.requests("The", regex="[a-z]+", max_new_tokens=9, seed=1,
                                                    temperature=1.0),
                                 *engine.requests("The", max_new_tokens=9)])
    assert bound.finish_reason == "stuck" and len(bound.token_ids) == 1
    assert free == engine.generate("The", max_new_tokens=9)[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"json_schema": {"type": "foo"}}, "Invalid type"), ({"json_schema": "{"}, "invalid or not supported"),
    ({"json_schema": "5"}, "object"),
    ({"regex": "("}, "unclosed group"), ({"json_schema": {"type": "array", "uniqueItems": True}},
                                         "uniqueItems"),
    ({"json_schema": {"$ref": "http://a/b"}}, "retriev"), ({"json_schema": {"enum": []}}, "Unsatisfiable"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "(" * 20_000 + ")" * 20_000}, "invalid or not supported"),
    ({"json_schema": {}, "regex": "a"}, "not both"),
    ({"json_schema": '{"items":' * 20_000 + "{}" + "}" * 20_000}, "recursion"),
    ({"regex": "a", "num_beams": 2}, "beams")])
def test_invalid_and_unsupported_grammars_are_refused(engine, options, message):
    with pytest.raises(ModelLinkError, match=message):
        engine.generate("The", **options)


def test_a_missing_library_names_the_extra(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ModelLinkError, match=r"modellink-infer\[constrained\]"):
        engine.generate("The", regex="a")


def test_the_command(command, llama, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for schema in (tmp_path / "schema.json", json.dumps(SCHEMA)):
        found = command("generate", "--load", llama, "--prompt", "The", "--json-schema", schema,
                        "--max-new-tokens", 150, "--device", "cpu", "--do-sample", "--seed", 1)
        assert found.status == 0 and matches(found.out)
    assert command("generate", "--load", llama, "--prompt", "a", "--json-schema", tmp_path / "no").status == 2


def test_the_server(engine):
    testclient = pytest.importorskip("starlette.testclient")
    pytest.importorskip("httpx")
    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service

    def ask(**body: Any) -> Any:
        return client.post("/v1/chat/completions",
                           json={"messages": [{"role": "user", "content": "Hi"}], "seed": 5,
                                                         "max_tokens": 150, **body})
    app = make_app(Service(engine, max_waiting=4), name="tiny", api_key=None, max_body=10_000)
    with testclient.TestClient(app) as client:
        named = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
        assert matches(ask(response_format=named).json()["choices"][0]["message"]["content"])
        events = ask(response_format=named, stream=True).text.split("\n\n")
        deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events
                  if event.startswith("data: {")]
        assert matches("".join(delta.get("content", "") for delta in deltas))
        anything = ask(response_format={"type": "json_object"}, max_tokens=200,
                       temperature=0).json()["choices"][0]
        assert anything["message"]["content"].startswith("{")
        found = ask(response_format={"type": "regex", "regex": "[0-9]{4}"}).json()["choices"][0]
        assert re.fullmatch("[0-9]{4}", found["message"]["content"]) and found["finish_reason"] == "stop"
        for wrong, message in (({"type": "xml"}, "must have the type"),
                               ({"type": "regex"}, "must have the type"),
                               ({"type": "regex", "regex": "("}, "group"),
                               ({"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}},
                                "Invalid type")):
            response = ask(response_format=wrong)
            assert response.status_code == 400, response.text
            assert message in response.json()["error"]["message"]
