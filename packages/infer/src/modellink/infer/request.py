"""One prompt on its way to an answer: what was asked, what came so far, what is given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from modellink.data_prep import Tokenizer
from modellink.infer.sampling import Sampling
from modellink.infer.text import GrowingText
from modellink.kernels.errors import ModelLinkError

FinishReason = Literal["stop", "length", "cancelled", "stuck", "failed"]


class NoRoom(ModelLinkError):
    """A prompt with its answer is longer than the model's sequences, or than the cache."""


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: what was generated, without special tokens and without the stop string that ended it; empty where the
            checkpoint has no tokenizer.
        token_ids: all tokens that were generated, with the one that ended the text.
        finish_reason: `stop` (an end token, a stop string or stop id, or the end of what a schema allows), `length`
            (`max_new_tokens`), `cancelled`, or `stuck` (a schema or expression that became too complex to follow).
        logprobs: natural log of the probability of each token under the model, before temperature and filters; None
            unless they were asked for.
        prompt_tokens: how many tokens the prompt has.
        top_logprobs: for each token the most likely ones in its place, as (token id, log-probability), where asked for.
        score: of a beam: the sum of its log-probabilities over (its tokens ^ length penalty).
        prompt_logprobs: of the prompt's tokens but the first, each given those before it, where asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    prompt_tokens: int = 0
    top_logprobs: list[list[tuple[int, float]]] | None = None
    score: float | None = None
    prompt_logprobs: list[float] | None = None


@dataclass(frozen=True)
class Beams:
    """Beam search: `beams` texts grow side by side and the best `count` are given back."""

    beams: int
    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True)
class Request:
    """What is asked; checked against the model already."""

    prompt: Sequence[int]
    max_new_tokens: int  # 0 for those who only ask about the prompt
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0  # how many alternatives to report for each token, with `logprobs` or `prompt_logprobs`
    beams: Beams | None = None
    before: str = ""  # what the text of the answer begins with: the prompt, where it is to be shown too
    detokenize: bool = True
    grammar: str | None = None  # what the answer keeps to, see constraint.py
    prompt_logprobs: bool = False


@dataclass
class Answer:
    """What came so far; `push` is the only way it grows, so that it ends by the same rules wherever it is computed."""

    request: Request
    text: GrowingText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # characters of the text before each token
    prompt_logprobs: list[float] = field(default_factory=list)  # of the prompt's tokens from the second, as far as computed
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    cancelled: bool = False  # a wish; of several ranks the first one's counts
    finish_reason: FinishReason | None = None
    fault: Exception | None = None  # why it `failed`: a fault of ours that met this answer alone

    @classmethod
    def to(cls, request: Request, tokenizer: Tokenizer | None) -> Answer:
        wanted = request.detokenize or request.stop_strings
        return cls(request, GrowingText(tokenizer if wanted else None, request.stop_strings))

    def push(self, token_id: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()) -> str:
        """Add a token; the piece of text that became certain. Sets `finish_reason` when it was the last one."""
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
    def prompt_left(self) -> int:
        """How many tokens of the prompt have no log-probability yet, of those that are to have one."""
        return len(self.request.prompt) - 1 - len(self.prompt_logprobs) if self.request.prompt_logprobs else 0

    def end(self, reason: FinishReason) -> str:
        """No token comes any more; the text that was held back."""
        piece = self.text.finish()
        self.finish_reason = "stop" if self.text.stopped else reason
        return piece

    def fail(self, fault: Exception) -> str:
        """It cannot go on; `generation` raises the fault."""
        self.fault, self.finish_reason = fault, "failed"
        return ""

    def generation(self, score: float | None = None) -> Generation:
        assert self.finish_reason is not None
        if self.fault is not None:
            raise self.fault
        asked = self.request
        return Generation(asked.before + self.text.text, self.token_ids, self.finish_reason,
                          self.logprobs if asked.logprobs else None, len(asked.prompt),
                          self.top_logprobs if asked.logprobs and asked.top_logprobs else None,
                          score, self.prompt_logprobs if asked.prompt_logprobs else None)
