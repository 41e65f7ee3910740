# SPDX-License-Identifier: Apache-2.0
"""The protocol between a benchmark and a model. Requests are texts; the backend tokenizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Turn(NamedTuple):
    """A message of `user` or `assistant` in a chat."""

    role: str
    text: str


Context = str | tuple[Turn, ...]
"""A prompt: a text, or the turns of a chat, to which the backend applies a template."""


class LikelihoodRequest(NamedTuple):
    """A context and a continuation whose likelihood is requested.

    Attributes:
        context: the text before; it does not end with white space.
        continuation: the text after. It begins with the space between the two: " A" after "Answer:".
        alone: tokenize the continuation on its own and count only its last token. Otherwise its tokens are those after the
            context when both are tokenized as one text.
    """

    context: Context
    continuation: str
    alone: bool = False


class Likelihood(NamedTuple):
    """The likelihood of a continuation.

    Attributes:
        logprob: sum of the natural log-probabilities of its tokens.
        greedy: whether each of its tokens is the most likely one.
        dropped: number of tokens cut from the beginning of a context that is too long for the model.
    """

    logprob: float
    greedy: bool
    dropped: int = 0


class GenerationRequest(NamedTuple):
    """A request for a generated text.

    Attributes:
        until: stop strings, in addition to the model's end tokens; they are not part of the text.
        max_tokens: maximum length.
        temperature: sampling temperature; 0: greedy decoding.
        seed: seed of sampling, if the temperature is not 0.
    """

    context: Context
    until: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Completion(NamedTuple):
    """A generated text; `dropped` tokens were cut from the beginning of a context that is too long for the model."""

    text: str
    dropped: int = 0


class Backend(Protocol):
    """A model that returns likelihoods and generates texts."""

    def describe(self) -> Mapping[str, Any]:
        """Describe the model as JSON values.

        `fingerprint` is required: a string that stays the same as long as answers do, for any batch size and layout, and differs
        for other weights or another precision. It is requested first and must be cheap.
        """
        ...

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context, in the order of the requests.

        The choices of a question are adjacent and share their context. A result must not depend on the other requests.
        """
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterable[tuple[int, Completion]]:
        """Yield the number of each request and its text as soon as it is finished; a text must not depend on other requests.

        All requests are passed at once, so that the backend can start the next text when one has ended.
        """
        ...
