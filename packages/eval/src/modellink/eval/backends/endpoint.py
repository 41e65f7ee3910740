"""Any server that speaks OpenAI's HTTP interface (platform.openai.com/docs/api-reference): ours, vLLM, llama.cpp and others.

Texts are written by `completions`, chats by `chat/completions`. A likelihood is asked for as `completions` with `echo`,
`logprobs` and one new token, which gives the log-probability of each token of the prompt; servers that do not do that are told
apart by their answer, and tasks that need likelihoods end with a message that says so. Where a token reaches over the boundary
between prompt and choice, its whole likelihood counts for the choice. A server that is busy, or a connection that breaks or times
out, is tried again after a while. Not here: retrying a request that the server refuses.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from typing import Any

import httpx

from modellink.eval.backends.backend import Completion, GenerationRequest, Likelihood, LikelihoodRequest
from modellink.kernels.errors import ModelLinkError

STOPS = 4  # more than that many stop strings are refused by some servers; the others are looked for here
BUSY = (429, 502, 503, 504)
WAITS = (0.5, 1, 2, 4, 8)  # seconds before a request is made again, where the server is busy or the connection broke
LENGTHS = ("max_tokens", "max_completion_tokens")  # of the longest answer; chats of newer models take the second


class Endpoint:
    """A server's model.

    Args:
        address: up to and with `/v1`.
        model: one of those it lists; None where it lists one.
        workers: how many requests are under way together.

    Raises:
        ModelLinkError: nobody answers, or not in the way of that interface, or there are several models.
    """

    def __init__(self, address: str, model: str | None = None, *, workers: int = 32, timeout: float = 600.0) -> None:
        self.address = address.rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._pool = ThreadPoolExecutor(workers)
        try:
            listed = [str(item["id"]) for item in self._ask("GET", "models")["data"]]
        except (KeyError, TypeError):
            raise self._strange("models") from None
        if model is None and len(listed) != 1:
            raise ModelLinkError(f"the server has {len(listed)} models: {', '.join(listed[:8])}", where=address,
                                 fix="name one with --endpoint-model")
        if model is not None and listed and model not in listed:
            raise ModelLinkError(f"the server has no model {model}", where="--endpoint-model",
                                 fix=f"it has {', '.join(listed[:8])}")
        self.model = model or listed[0]
        self._length = LENGTHS[0]

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def describe(self) -> Mapping[str, Any]:
        """A server does not say which weights it has: the fingerprint is its address and its model's name."""
        return {"endpoint": self.address, "served model": self.model, "fingerprint": f"endpoint {self.address} {self.model}"}

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        return list(self._pool.map(self._likelihood, requests))

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        asked = {self._pool.submit(self._write, request): number for number, request in enumerate(requests)}
        try:
            for done in as_completed(asked):
                yield asked[done], done.result()
        finally:
            for future in asked:  # of a run that ends early
                future.cancel()

    def _write(self, request: GenerationRequest) -> Completion:
        body: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": request.temperature, "top_p": request.top_p}
        if request.temperature:
            body["seed"] = request.seed
        if request.until:
            body["stop"] = list(request.until[:STOPS])
        try:
            if isinstance(request.context, str):
                text = self._ask("POST", "completions", body | {"prompt": request.context})["choices"][0]["text"]
            else:
                messages = [{"role": turn.role, "content": turn.text} for turn in request.context]
                text = self._chat(body | {"messages": messages})["choices"][0]["message"]["content"]
        except (KeyError, TypeError, IndexError):
            raise self._strange("completions") from None
        ends = [place for stop in request.until if (place := (text or "").find(stop)) >= 0]
        return Completion((text or "")[:min(ends, default=None)])

    def _chat(self, body: dict[str, Any]) -> Any:
        """Ask in a chat, with the name of the longest answer that the model takes."""
        named = {self._length if name == LENGTHS[0] else name: value for name, value in body.items()}
        try:
            return self._ask("POST", "chat/completions", named)
        except ModelLinkError as error:
            if LENGTHS[1] in named or "answers 400" not in error.what or LENGTHS[1] not in error.what:
                raise
        self._length = LENGTHS[1]
        return self._chat(body)

    def _likelihood(self, request: LikelihoodRequest) -> Likelihood:
        if not isinstance(request.context, str) or request.alone:
            raise ModelLinkError("a server does not say how likely a choice is " + (
                "by its last token alone" if request.alone else "in a chat"), where="--endpoint",
                fix="use --prompt-style lm-eval" if request.alone else "ask with plain text (--no-chat-template)")
        text = request.context + request.continuation
        body = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        try:
            found = self._ask("POST", "completions", body)["choices"][0]["logprobs"]
            offsets, logprobs, best = found["text_offset"], found["token_logprobs"], found["top_logprobs"]
        except (KeyError, TypeError, IndexError):
            found = None
        if not found or len(offsets) != len(logprobs) or not offsets or len(logprobs) < 2:
            raise ModelLinkError("the server does not give the log-probabilities of a prompt", where=self.address,
                                 fix="use a server that does, or a task whose answers are written")
        # Counted from the end, where the new token stands: some servers count the beginning token's name as text.
        boundary = len(request.context) + offsets[-1] - len(text)
        places = [place for place, (start, end) in enumerate(pairwise(offsets)) if start >= boundary or end > boundary]
        values = [logprobs[place] for place in places]
        if not values or any(value is None for value in values):
            raise ModelLinkError("the server gives no log-probability for a token of a choice", where=self.address)
        highest = [max((best[place] or {"": -math.inf}).values()) for place in places]
        return Likelihood(sum(values), all(value >= high - 1e-6 for value, high in zip(values, highest, strict=True)))

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        if body is not None:
            body = {"model": self.model, **body}
        for wait in (*WAITS, None):
            try:
                answer = self._client.request(method, f"{self.address}/{path}", json=body)
            except httpx.HTTPError as error:
                if body is not None and wait is not None and isinstance(error, httpx.TransportError):
                    time.sleep(wait)  # it was there when it was asked for its models
                    continue
                raise ModelLinkError(f"the server cannot be asked: {error}", where=f"--endpoint {self.address}",
                                     fix="give the address up to /v1 of a server that runs") from None
            if answer.status_code not in BUSY or wait is None:
                break
            time.sleep(wait)
        if answer.status_code != httpx.codes.OK:
            raise ModelLinkError(f"the server answers {answer.status_code}: {answer.text[:300]}", where=f"{self.address}/{path}")
        try:
            return answer.json()
        except ValueError:
            raise self._strange(path) from None

    def _strange(self, path: str) -> ModelLinkError:
        return ModelLinkError("the server answers in another way than OpenAI's interface", where=f"{self.address}/{path}",
                              fix="give the address up to /v1")
