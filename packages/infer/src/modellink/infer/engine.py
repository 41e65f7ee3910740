"""`load` and `Engine`: generation and likelihoods as a library.

With several ranks each calls the same methods with the same arguments and gets the same results; the processes are
torchrun's, or those that `modellink-infer --tp N` starts. One engine lives in a process at a time, because megatron-core's
groups do, and one thread uses it at a time; the server has a thread for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch

from modellink.core import launch, processes
from modellink.infer.plan import Plan, make_plan
from modellink.infer.prompts import Message, Options, Prompts, check_ids, make_requests
from modellink.infer.request import Answer, Generation, Request
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout
from modellink.kernels.progress import Work

if TYPE_CHECKING:
    from modellink.infer.batch import Batch
    from modellink.infer.cache import PagedCache
    from modellink.infer.score import Likelihood

PASS_TOKENS = 512  # of one pass over pieces of prompts; each pass makes answers that are under way wait


def load(path: Path | str, *, layout: ParallelLayout = ParallelLayout(),
         device: Literal["auto", "cpu", "cuda", "npu"] = "auto", dtype: torch.dtype | str | None = None,
         family: str | None = None, tokenizer: Path | str | None = None, prompt_type: str | None = None, batch_size: int = 16,
         cache_tokens: int | None = None, native: bool | None = False, int8: bool = False, graphs: bool | None = None,
         show: bool = False) -> Engine:
    """Load a Hugging Face folder, a Megatron-Core, Megatron-Legacy or torch_dist checkpoint, whatever layout it was written at.

    Args:
        path: the checkpoint.
        layout: the tensor, pipeline and expert parallel sizes to run at; there must be as many processes.
        device: `auto` takes an NPU, else a CUDA GPU, else the CPU.
        dtype: float32, bfloat16 or float16; None takes what most of the checkpoint's weights have.
        family: the family where the checkpoint does not say it.
        tokenizer: a Hugging Face folder with config.json and tokenizer, for a checkpoint that does not carry its own.
        prompt_type: the template around chats, by name (see template.py); None takes the one that the checkpoint was trained
            with, else the tokenizer's own.
        batch_size: how many prompts are computed together at most.
        cache_tokens: how many tokens the cache holds; None is `batch_size` of the longest sequences, if memory allows.
        native: on a CPU, compute passes of few tokens by a compiled function where it takes the model and there is a compiler;
            None does it if it is measured to be faster.
        int8: with that function, hold the weights in int8, with a scale for each row; the error is printed with `show`.
        graphs: compute passes of single tokens from captured graphs; None does it on CUDA and NPUs, where it can be done.
        show: show progress on stderr.

    Raises:
        ModelLinkError: nothing there or damaged, a layout that does not fit, a device that is not there.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    plan = make_plan(path, layout=layout, device=device, index=index, dtype=dtype, family=family, tokenizer=tokenizer,
                     prompt_type=prompt_type)
    return Engine(plan, batch_size=batch_size, cache_tokens=cache_tokens, native=native, int8=int8, graphs=graphs,
                  show=show)


class Engine:
    """A model that is ready to answer. Make one with `load`.

    Attributes:
        spec: the architecture.
        tokenizer: None where the checkpoint has none; token ids work without.
    """

    def __init__(self, plan: Plan, *, batch_size: int = 16, cache_tokens: int | None = None, native: bool | None = False,
                 int8: bool = False, graphs: bool | None = None, show: bool = False) -> None:
        if batch_size < 1:
            raise ModelLinkError(f"the batch size is {batch_size}, it must be at least 1", where="--batch-size")
        processes.join(plan.device, plan.layout, seed=0)
        from modellink.infer.network import Network  # imports megatron, which only now is on its device
        self.plan, self.spec, self.tokenizer, self.batch_size = plan, plan.spec, plan.tokenizer, batch_size
        self.network = Network(plan.source, plan.layout, plan.device, plan.dtype, show=show and launch.rank() == 0,
                               native=native, int8=int8, graphs=graphs)
        self._cache_tokens = cache_tokens

    @cached_property
    def cache(self) -> PagedCache:
        """Where all answers of this engine have their keys and values; made when the first one is asked for."""
        return self.network.cache(rows=self.batch_size, piece=PASS_TOKENS, tokens=self._cache_tokens)

    def forget(self) -> None:
        """Drop the caches, and with them what prompts and texts to come could have in common with earlier ones."""
        self.__dict__.pop("cache", None)
        self.network.scoring = None

    def batch(self) -> Batch:
        """An empty batch over the cache; who adds answers to it steps it."""
        from modellink.infer.batch import Batch
        return Batch(self.network, self.cache, rows=self.batch_size, budget=PASS_TOKENS, tokenizer=self.tokenizer)

    def requests(self, prompts: Prompts, **options: Unpack[Options]) -> list[Request]:
        """Checked requests of prompts; see `prompts.make_requests` for what the options mean."""
        options.setdefault("prompt_type", self.plan.prompt_type)
        return make_requests(prompts, self.spec, self.tokenizer, **options)

    @overload
    def generate(self, prompts: Prompts | None = None, *, input_ids: Any = None, stream: Literal[False] = False,
                 **options: Unpack[Options]) -> list[Generation]: ...

    @overload
    def generate(self, prompts: Prompts | None = None, *, input_ids: Any = None, stream: Literal[True],
                 **options: Unpack[Options]) -> Stream: ...

    def generate(self, prompts: Any = None, *, input_ids: Any = None, stream: bool = False,
                 **options: Unpack[Options]) -> list[Generation] | Stream:
        """Answers to one prompt or many, in their order; a request in a batch gets what it gets alone.

        Args:
            prompts: a text, token ids, a chat, or a list of any of these; token ids may be a tensor or an array.
            input_ids: the original's name of `prompts`.
            stream: give what `stream` gives, as in the original's API.
            options: see `prompts.Options`. With `num_return_sequences` a prompt has so many answers, one after the other.

        Raises:
            ModelLinkError: see `prompts.make_requests`; nothing was computed.
        """
        if (prompts is None) == (input_ids is None):
            raise ModelLinkError("there is no prompt" if prompts is None else "there are prompts and input_ids",
                                 fix="give one of them")
        prompts = input_ids if prompts is None else prompts
        return self.stream(prompts, **options) if stream else self.answer(self.requests(prompts, **options))

    def answer(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for requests that are made already, each with options of its own; one with beams has several answers."""
        return [found for answers in self.each(requests) for found in answers]

    def each(self, requests: Sequence[Request], done: Callable[[int], None] = lambda count: None) -> Iterator[list[Generation]]:
        """The answers to each request, in the order of the requests, as soon as they and those before them are there.

        Args:
            done: is told how many requests came to their end, in whatever order.
        """
        from modellink.infer.beam import search
        batch = self.batch()
        answers = [Answer.to(request, self.tokenizer) for request in requests]
        joined = [answer for answer in answers if answer.request.beams is None]

        def step() -> None:
            if ended := sum(answer.finish_reason is not None for answer, _ in batch.step()):
                done(ended)
        try:
            for answer in joined:
                batch.add(answer)
            for answer in answers:
                if answer.request.beams is None:
                    while answer.finish_reason is None:
                        step()
                    yield [answer.generation()]
                    continue
                while not batch.idle:  # a search takes all the pages it finds
                    step()
                found = search(self.network, self.cache, answer.request, self.tokenizer)
                done(1)
                yield found
        finally:
            for answer in joined:
                batch.remove(answer)

    def stream(self, prompt: str | Sequence[int] | Sequence[Message], **options: Unpack[Options]) -> Stream:
        """The answer to one prompt in pieces of text, as they come."""
        requests = self.requests(prompt, **options)
        if len(requests) != 1:
            raise ModelLinkError(f"{len(requests)} answers were asked for, a stream has one",
                                 fix="use generate, or several streams")
        if requests[0].beams is not None:
            raise ModelLinkError("beams are known when they have come to their end; they cannot be streamed", fix="use generate")
        return Stream(self, requests[0])

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, show: bool = False,
                      ) -> list[tuple[float, bool]]:
        """How likely continuations are.

        Args:
            pairs: (token ids of a context, token ids of its continuation); what joins the two, such as a space, belongs to one
                of them.
            show: show progress on stderr.

        Returns:
            (sum of the natural log-probabilities of the continuation's tokens, whether greedy decoding would produce it), in
            the order of the pairs.
        """
        return [(sum(found.logprobs), found.greedy) for found in self._likelihoods(pairs, show)]

    def score(self, windows: Sequence[Sequence[int]], *, show: bool = False) -> list[list[float]]:
        """The negative log-likelihood in nats of every token of each window but its first, given those before it."""
        return [[-value for value in found.logprobs] for found in
                self._likelihoods([(window[:1], window[1:]) for window in windows], show)]

    def _likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], show: bool) -> list[Likelihood]:
        from modellink.infer.score import likelihoods
        for number, (context, continuation) in enumerate(pairs):
            check_ids(context, self.spec, f"context {number}")
            check_ids(continuation, self.spec, f"continuation {number}")
            if (length := len(context) + len(continuation) - 1) > self.spec.max_position_embeddings:
                raise ModelLinkError(f"pair {number} has {length + 1} tokens; the model's longest sequence is "
                                     f"{self.spec.max_position_embeddings}", fix="shorten the context")
        with Work("scoring", len(pairs), unit="texts", show=show) as work:
            return likelihoods(self.network, pairs, work.advance)


class Stream(Iterator[str]):
    """Pieces of an answer. They join to its text, split no character and hold no part of a stop string."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._answer = Answer.to(request, engine.tokenizer)
        self._pieces = self._run(engine.batch())

    def _run(self, batch: Batch) -> Iterator[str]:
        batch.add(self._answer)
        try:
            while not batch.idle:
                for _, piece in batch.step():
                    yield piece
        finally:
            batch.remove(self._answer)

    def __next__(self) -> str:
        return next(piece for piece in self._pieces if piece)

    def cancel(self) -> None:
        """Let the next token be the last; may be called from a signal handler. Of several ranks the first one's call counts."""
        self._answer.cancelled = True

    @property
    def generation(self) -> Generation:
        """The whole answer, once the pieces have come to their end."""
        if self._answer.finish_reason is None:
            raise ModelLinkError("the answer has not come to its end", fix="take the remaining pieces first")
        return self._answer.generation()
