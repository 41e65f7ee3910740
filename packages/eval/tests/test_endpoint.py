# SPDX-License-Identifier: Apache-2.0
"""A server over HTTP: the small model behind OpenAI's API gives the same scores as directly."""

import json
import math
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modellink.eval import EvalSettings, GenerationRequest, LikelihoodRequest, Turn, evaluate
from modellink.eval.backends.endpoint import Endpoint
from modellink.kernels.errors import ModelLinkError


class Handler(BaseHTTPRequestHandler):
    """Tokens are characters; `server.mode` makes it misbehave."""

    def do_GET(self):
        self.give({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        if self.server.mode == "busy":
            self.server.mode = ""
            self.send_error(503)
            return
        if self.server.mode == "breaks":
            self.server.mode = ""
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.server.mode == "new" and "max_tokens" in body:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
            return
        if self.server.mode == "refuses":
            self.send_error(400, "no echo here")
            return
        if self.path.endswith("chat/completions"):
            self.give({"choices": [{"message": {"content": body["messages"][-1]["content"][-8:]}}]})
        elif body.get("echo"):
            self.give({"choices": [{"text": body["prompt"], "logprobs": self.logprobs(body["prompt"] + "!")}]})
        else:
            ((_, written),) = self.server.model.generate([GenerationRequest(body["prompt"], (), 8)])
            self.give({"choices": [{"text": written.text}]})

    def logprobs(self, text):
        if self.server.mode == "none":
            return None
        values = [None] + [-1.0 - math.sin(ord(character) + place % 3) for place, character in enumerate(text[1:])]
        offsets, top = list(range(len(text))), [None, *({"x": -1.5} for _ in text[1:])]
        if self.server.mode == "bos":  # a beginning token whose name counts as text
            offsets = [0, *(3 + offset for offset in offsets)]
            values, top = [None, -7.0, *values[1:]], [None, {"x": -1.5}, *top[1:]]
        return {"text_offset": offsets, "token_logprobs": values, "top_logprobs": top}

    def give(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(ngram):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.model, server.models, server.asked, server.mode = ngram.NgramBackend(), ["small"], [], ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(server):
    with Endpoint(f"http://127.0.0.1:{server.server_port}/v1", workers=4) as endpoint:
        yield endpoint


def test_a_likelihood_is_the_sum_over_the_continuation(endpoint, server):
    (found,) = endpoint.loglikelihood([LikelihoodRequest("What is it? Answer:", " A")])
    values = Handler.logprobs(type("", (), {"server": server}), "What is it? Answer: A!")["token_logprobs"]
    assert found.logprob == pytest.approx(sum(values[-3:-1])) and found.greedy == all(value >= -1.5 for value in values[-3:-1])


def test_a_beginning_token_that_counts_as_text_shifts_nothing(endpoint, server):
    request = LikelihoodRequest("What is it? Answer:", " A")
    (plain,) = endpoint.loglikelihood([request])
    server.mode = "bos"
    assert endpoint.loglikelihood([request]) == [plain]


def test_the_bytes_of_a_character_all_belong_to_the_choice(endpoint, server, monkeypatch):
    """Three tokens that form one character have the same offset."""
    told = {"text_offset": [0, 1, 2, 2, 2, 3], "token_logprobs": [None, -1.0, -2.0, -3.0, -4.0, -9.0],
            "top_logprobs": [None, *({"x": -1.0} for _ in range(5))]}
    monkeypatch.setattr(Handler, "logprobs", lambda self, text: told)
    assert endpoint.loglikelihood([LikelihoodRequest("a:", "机")])[0].logprob == -9.0


def test_texts_and_chats_end_at_the_stops_also_those_not_sent(endpoint, server):
    until = ("#", "@", "^", "~", "is")
    request = GenerationRequest("seven ", until, 8)
    ((_, direct),) = server.model.generate([request])
    assert "is" in direct.text and dict(endpoint.generate([request]))[0].text == direct.text.split("is")[0]
    path, body, _ = server.asked[-1]
    assert path.endswith("/completions") and len(body["stop"]) == 4 and (body["max_tokens"], body["temperature"]) == (8, 0)


def test_a_run_over_http_scores_as_one_without(data, server, endpoint, backend, tmp_path):
    found = evaluate("gsm8k", data, endpoint, tmp_path / "out", prompt_style="lm-eval")
    expected = evaluate("gsm8k", data, backend, prompt_style="lm-eval")
    assert found["tasks"]["gsm8k"]["micro"]["unparsed"] == expected["tasks"]["gsm8k"]["micro"]["unparsed"] > 0
    assert found["tasks"]["gsm8k"]["accuracy"] == expected["tasks"]["gsm8k"]["accuracy"]
    assert evaluate("mmlu", data, endpoint, prompt_style="lm-eval")["tasks"]["mmlu"]["micro"]["questions"] == 23
    evaluate("gsm8k", data, endpoint, settings=EvalSettings(chat="hf-chat-template"))
    assert server.asked[-1][0].endswith("chat/completions") and server.asked[-1][1]["messages"][0]["role"] == "user"


def test_a_server_that_is_busy_is_asked_again(endpoint, server):
    server.mode = "busy"
    assert list(endpoint.generate([GenerationRequest("x", (), 8)])) and len(server.asked) == 2


def test_a_connection_that_breaks_is_made_again(endpoint, server):
    server.mode = "breaks"
    assert list(endpoint.generate([GenerationRequest("x", (), 8)])) and len(server.asked) == 2


def test_a_server_that_goes_away_is_named_in_the_end(endpoint, server, monkeypatch):
    monkeypatch.setattr("modellink.eval.backends.endpoint.WAITS", (0.01, 0.01))
    server.shutdown()
    server.server_close()
    with pytest.raises(ModelLinkError, match="request to the server failed"):
        list(endpoint.generate([GenerationRequest("x", (), 8)]))


def test_newer_models_call_the_longest_answer_otherwise(endpoint, server):
    server.mode = "new"
    asked = [GenerationRequest((Turn("user", text),), (), 8) for text in ("one", "two")]
    found = [dict(endpoint.generate([request]))[0].text for request in asked]
    assert found == ["one", "two"]
    assert ["max_tokens" in body for _, body, _ in server.asked] == [True, False, False]
    assert server.asked[-1][1]["max_completion_tokens"] == 8


def test_another_address_is_another_model(endpoint):
    assert endpoint.address in endpoint.describe()["fingerprint"] and "small" in endpoint.describe()["fingerprint"]


@pytest.mark.parametrize(("mode", "message"), [("none", "does not return the log-probabilities"), ("refuses", "responds 400")])
def test_a_server_without_likelihoods_is_named(endpoint, server, mode, message):
    server.mode = mode
    with pytest.raises(ModelLinkError, match=message):
        endpoint.loglikelihood([LikelihoodRequest("a", " b")])


def test_which_model(server, monkeypatch):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    server.models = ["one", "two"]
    with pytest.raises(ModelLinkError, match="2 models: one, two"):
        Endpoint(address)
    with pytest.raises(ModelLinkError, match="no model three"):
        Endpoint(address, "three")
    with Endpoint(address, "two") as endpoint:
        list(endpoint.generate([GenerationRequest("x", (), 8)]))
    assert server.asked[-1][1]["model"] == "two" and server.asked[-1][2] == "Bearer key"


def test_nobody_there(command, data, tmp_path, snapshot):
    before = snapshot(tmp_path)
    done = command("run", "--task", "mmlu", "--task-data-path", "data", "--output", "out", "--endpoint", "http://127.0.0.1:9/v1")
    assert done.returncode == 2 and "request to the server failed" in done.stderr and "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before
