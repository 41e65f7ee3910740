"""The protocol between a benchmark and what it evaluates. It speaks in texts; tokens are the backend's own business."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Turn(NamedTuple):
    """What `user` or `assistant` says in a chat."""

    role: str
    text: str


Context = str | tuple[Turn, ...]
"""What a model is given: a text, or the turns of a chat, which the backend puts into a template."""


class LikelihoodRequest(NamedTuple):
    """A text and a continuation of it.

    Attributes:
        context: what stands before; a text does not end with white space.
        continuation: what follows. It owns the blank between the two: " A" after "Answer:".
        alone: the continuation is tokenized by itself, and only its last token counts. Else its tokens are those that follow
            the context's when both are tokenized as one text.
    """

    context: Context
    continuation: str
    alone: bool = False


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logprob: sum of the natural log-probabilities of its tokens.
        greedy: whether every token of it is the most likely one.
        dropped: how many tokens were cut from the beginning of a context too long for the model.
    """

    logprob: float
    greedy: bool
    dropped: int = 0


class GenerationRequest(NamedTuple):
    """A text to be written.

    Attributes:
        until: strings that end it and are not part of it, beside the model's own end tokens.
        max_tokens: its longest length.
        temperature: 0 takes the most likely token always.
        seed: of the draws, where it is not 0.
    """

    context: Context
    until: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Completion(NamedTuple):
    """What a model wrote; `dropped` tokens were cut from the beginning of a context too long for it."""

    text: str
    dropped: int = 0


class Backend(Protocol):
    """Something that knows how likely texts are, and writes some."""

    def describe(self) -> Mapping[str, Any]:
        """What it is, as values that JSON can hold.

        `fingerprint` must be there: a text that is the same for as long as answers are, whatever the batch or the layout, and
        another one for other weights or another precision. It is asked for before anything else and must be cheap.
        """
        ...

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """The likelihood of each continuation after its context, in the order of the requests.

        The choices of one question come one after the other and share their context. What an answer is must not depend on the
        other requests.
        """
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterable[tuple[int, Completion]]:
        """A text for each request, as it is finished, with the number of the request; none must depend on the others.

        All that is to be written is asked for at once, so that the backend can begin the next text when one has ended.
        """
        ...
