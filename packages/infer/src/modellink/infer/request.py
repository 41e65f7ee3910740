# SPDX-License-Identifier: Apache-2.0
"""A request, the completion that grows for it, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from modellink.data_prep import Tokenizer
from modellink.infer.sampling import BeamSearch, Sampling
from modellink.infer.text import GrowingText
from modellink.kernels.errors import ModelLinkError

FinishReason = Literal["stop", "length", "cancelled", "stuck", "failed"]
TokenLogprobs = list[tuple[int, float]]
"""(token id, log-probability) of the most likely tokens at one position, most likely first."""


class SequenceTooLong(ModelLinkError):
    """The prompt and its completion exceed the maximum length of the model or the capacity of the cache."""


@dataclass(frozen=True)
class Generation:
    """A finished completion.

    Attributes:
        text: the generated text, without special tokens and without the stop string that ended it; empty if
            the checkpoint has no tokenizer.
        token_ids: all generated tokens, including the one that ended the completion.
        finish_reason: `stop` (end token, stop string, stop id, or the grammar is complete), `length`
            (`max_new_tokens`), `cancelled`, or `stuck` (the grammar became too complex to follow).
        logprobs: log-probability of each token in nats, before temperature and filters; None unless
            requested.
        prompt_tokens: number of tokens in the prompt.
        top_logprobs: the most likely tokens at each position, if requested.
        score: of a beam: sum of the log-probabilities / (tokens ^ length penalty).
        prompt_logprobs: of each prompt token after the first, given those before it, if requested.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    prompt_tokens: int = 0
    top_logprobs: list[TokenLogprobs] | None = None
    score: float | None = None
    prompt_logprobs: list[float] | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """A request that has been checked against the model.

    Attributes:
        prompt: token ids.
        max_new_tokens: 0 if only the prompt is evaluated.
        top_logprobs: number of alternatives to report per token, with `logprobs` or `prompt_logprobs`.
        text_prefix: what the text of the completion begins with: the prompt, if it is echoed.
        grammar: what the completion must match; see grammar.py.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    beams: BeamSearch | None = None
    text_prefix: str = ""
    detokenize: bool = True
    grammar: str | None = None
    prompt_logprobs: bool = False


@dataclass
class Completion:
    """The tokens generated so far for a request. It grows only by `push`, so that all callers share the rules
    for its end.

    Attributes:
        offsets: length of the text before each token, in characters.
        prompt_logprobs: of the prompt tokens from the second on, as far as computed.
        cancelled: cancellation is requested; on several ranks the first rank's value counts.
        error: why the completion `failed`: an error that concerns it only.
    """

    request: GenerationRequest
    text: GrowingText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cancelled: bool = False
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @classmethod
    def start(cls, request: GenerationRequest, tokenizer: Tokenizer | None) -> Completion:
        """Return the empty completion of a request."""
        needs_text = request.detokenize or request.stop_strings
        return cls(request, GrowingText(tokenizer if needs_text else None, request.stop_strings))

    def push(self, token_id: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()) -> str:
        """Add a token and return the new piece of text. Sets `finish_reason` if it was the last token."""
        self.offsets.append(self.text.length)
        self.token_ids.append(token_id)
        if logprob is not None:
            self.top_logprobs.append(list(top))
            self.logprobs.append(logprob)
        piece = self.text.push(token_id)
        if token_id in self.request.stop_ids or self.text.stopped:
            return piece + self.end("stop")
        if len(self.token_ids) == self.request.max_new_tokens:
            return piece + self.end("length")
        return piece

    @property
    def missing_prompt_logprobs(self) -> int:
        """Number of requested prompt log-probabilities that are not computed yet."""
        return len(self.request.prompt) - 1 - len(self.prompt_logprobs) if self.request.prompt_logprobs else 0

    def end(self, reason: FinishReason) -> str:
        """Finish the completion and return the text that was held back."""
        piece = self.text.finish()
        self.finish_reason = "stop" if self.text.stopped else reason
        return piece

    def fail(self, error: Exception) -> str:
        """Finish the completion with an error, which `generation` raises."""
        self.error, self.finish_reason = error, "failed"
        return ""

    def generation(self, score: float | None = None) -> Generation:
        """Return the result of a finished completion."""
        assert self.finish_reason is not None
        if self.error is not None:
            raise self.error
        request = self.request
        logprobs = self.logprobs if request.logprobs else None
        top_logprobs = self.top_logprobs if request.logprobs and request.top_logprobs else None
        prompt_logprobs = self.prompt_logprobs if request.prompt_logprobs else None
        return Generation(request.text_prefix + self.text.text, self.token_ids, self.finish_reason, logprobs,
                          len(request.prompt), top_logprobs, score, prompt_logprobs)
