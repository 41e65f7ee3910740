# SPDX-License-Identifier: Apache-2.0
"""`load` and `Engine`: generation and likelihoods as a library.

With several ranks, each calls the same methods with the same arguments and gets the same results; the
processes are started by torchrun or by `modellink-infer --tp N`. A process has one engine at a time, because
megatron-core's process groups are global, and one thread uses it at a time; the server has a thread for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch

from modellink.core import launch, processes
from modellink.infer.arguments import GenerationArguments
from modellink.infer.plan import LoadPlan, make_load_plan
from modellink.infer.prompts import Message, Prompts, check_ids, make_requests
from modellink.infer.request import Completion, Generation, GenerationRequest
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout
from modellink.kernels.progress import Work

if TYPE_CHECKING:
    from modellink.infer.batch import ContinuousBatch
    from modellink.infer.cache import PagedCache
    from modellink.infer.score import ContinuationLikelihood, Scorer

PREFILL_TOKENS = 512  # of one pass with prefill chunks; running completions wait for each such pass


def load(path: Path | str, *, layout: ParallelLayout = ParallelLayout(),
         device: Literal["auto", "cpu", "cuda", "npu"] = "auto", dtype: torch.dtype | str | None = None,
         family: str | None = None, tokenizer: Path | str | None = None, prompt_type: str | None = None,
         batch_size: int = 16, cache_tokens: int | None = None, native: bool | None = False,
         int8: bool = False, graphs: bool | None = None, iteration: int | None = None,
         show: bool = False) -> Engine:
    """Load a Hugging Face folder or a Megatron-Core, Megatron-Legacy or torch-dist checkpoint, written at any
    layout.

    Args:
        path: the checkpoint.
        layout: tensor, pipeline and expert parallel sizes to run at; there must be as many processes.
        device: `auto` uses an NPU, else a CUDA GPU, else the CPU.
        dtype: float32, bfloat16 or float16. Default: that of most of the checkpoint's weights.
        family: model family, if the checkpoint does not name it.
        tokenizer: a Hugging Face folder with config.json and tokenizer, for a checkpoint without them.
        prompt_type: the template for chats, by name (see template.py). Default: the one that the checkpoint
            was trained with, else the tokenizer's own.
        batch_size: the most prompts that are computed together.
        cache_tokens: capacity of the cache in tokens. Default: `batch_size` sequences of the maximum length,
            if half of the free memory is enough for that.
        native: on a CPU, run passes over few tokens with a compiled function, if it supports the model and
            there is a C compiler. None: only if it is measured to be faster.
        int8: with the compiled function, store the weights in int8 with a scale per row; `show` prints the
            error.
        graphs: run decode passes from captured graphs. None: on CUDA and NPUs, if the model supports it.
        iteration: of a Megatron checkpoint. Default: the last complete one.
        show: print progress and notes to stderr.

    Raises:
        ModelLinkError: the checkpoint is missing or damaged, the layout does not fit the model, or the device
            is not available.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    plan = make_load_plan(path, layout=layout, device=device, index=index, dtype=dtype, family=family,
                          tokenizer=tokenizer, prompt_type=prompt_type, iteration=iteration)
    return Engine(plan, batch_size=batch_size, cache_tokens=cache_tokens, native=native, int8=int8,
                  graphs=graphs, show=show)


class Engine:
    """A loaded model. Create one with `load`.

    Attributes:
        spec: the architecture.
        tokenizer: None if the checkpoint has none; prompts must then be token ids.
    """

    def __init__(self, plan: LoadPlan, *, batch_size: int = 16, cache_tokens: int | None = None,
                 native: bool | None = False, int8: bool = False, graphs: bool | None = None,
                 show: bool = False) -> None:
        if batch_size < 1:
            raise ModelLinkError(f"the batch size is {batch_size}, it must be at least 1",
                                 where="--batch-size")
        processes.join(plan.device, plan.layout, seed=0)
        from modellink.infer.fast_paths import FastPathSettings
        from modellink.infer.network import Network  # imports megatron, which is on its device only now
        self.plan, self.spec, self.tokenizer, self.batch_size = plan, plan.spec, plan.tokenizer, batch_size
        self.network = Network(plan.source, plan.layout, plan.device, plan.dtype,
                               show=show and launch.rank() == 0,
                               fast_paths=FastPathSettings(native, int8, graphs))
        self._cache_tokens = cache_tokens

    @cached_property
    def cache(self) -> PagedCache:
        """The cache of all completions of this engine, allocated at its first use."""
        return self.network.make_cache(max_sequences=self.batch_size, max_chunk=PREFILL_TOKENS,
                                       tokens=self._cache_tokens)

    @cached_property
    def _scorer(self) -> Scorer:
        from modellink.infer.score import Scorer
        return Scorer(self.network)

    def forget(self) -> None:
        """Drop the caches, and with them all cached prefixes."""
        self.__dict__.pop("cache", None)
        self.__dict__.pop("_scorer", None)

    def batch(self) -> ContinuousBatch:
        """Return an empty batch over the cache. The caller adds completions and steps it."""
        from modellink.infer.batch import ContinuousBatch
        return ContinuousBatch(self.network, self.cache, max_sequences=self.batch_size,
                               token_budget=PREFILL_TOKENS, tokenizer=self.tokenizer)

    def requests(self, prompts: Prompts, **arguments: Unpack[GenerationArguments]) -> list[GenerationRequest]:
        """Return checked requests for prompts; see `prompts.make_requests`."""
        arguments.setdefault("prompt_type", self.plan.prompt_type)
        return make_requests(prompts, self.spec, self.tokenizer, **arguments)

    @overload
    def generate(self, prompts: Prompts | None = None, *, input_ids: Any = None,
                 stream: Literal[False] = False,
                 **arguments: Unpack[GenerationArguments]) -> list[Generation]: ...

    @overload
    def generate(self, prompts: Prompts | None = None, *, input_ids: Any = None, stream: Literal[True],
                 **arguments: Unpack[GenerationArguments]) -> Stream: ...

    def generate(self, prompts: Any = None, *, input_ids: Any = None, stream: bool = False,
                 **arguments: Unpack[GenerationArguments]) -> list[Generation] | Stream:
        """Return the completions of one or many prompts, in order. In fp32 a completion does not depend on
        the batch.

        Args:
            prompts: a text, token ids, a chat, or a list of any of these; token ids may be a tensor or an
                array.
            input_ids: the original's name of `prompts`.
            stream: return what `stream` returns, as in the original's API.
            arguments: see `GenerationArguments`. With `num_return_sequences`, the completions of a prompt
                follow each other.

        Raises:
            ModelLinkError: see `prompts.make_requests`; nothing was computed.
        """
        if prompts is None and input_ids is None:
            raise ModelLinkError("there is no prompt", fix="pass prompts")
        if prompts is not None and input_ids is not None:
            raise ModelLinkError("both prompts and input_ids are given", fix="pass one of them")
        prompts = input_ids if prompts is None else prompts
        if stream:
            return self.stream(prompts, **arguments)
        return self.complete(self.requests(prompts, **arguments))

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Return the completions of checked requests; one with beams may have several."""
        return [found for completions in self.iter_completions(requests) for found in completions]

    def iter_completions(self, requests: Sequence[GenerationRequest],
                         on_finished: Callable[[int], None] = lambda count: None,
                         ) -> Iterator[list[Generation]]:
        """Yield the completions of each request, in order, as soon as they and all before them are finished.

        Args:
            on_finished: called with the number of requests that finished, in whatever order.
        """
        from modellink.infer.beam import search
        batch = self.batch()
        completions = [Completion.start(request, self.tokenizer) for request in requests]
        batched = [completion for completion in completions if completion.request.beams is None]

        def step() -> None:
            if count := sum(completion.finish_reason is not None for completion, _ in batch.step()):
                on_finished(count)
        try:
            for completion in batched:
                batch.add(completion)
            for completion in completions:
                if completion.request.beams is None:
                    while completion.finish_reason is None:
                        step()
                    yield [completion.generation()]
                    continue
                while not batch.idle:  # beam search uses all free pages
                    step()
                found = search(self.network, self.cache, completion.request, self.tokenizer)
                on_finished(1)
                yield found
        finally:
            for completion in batched:
                batch.remove(completion)

    def stream(self, prompt: str | Sequence[int] | Sequence[Message],
               **arguments: Unpack[GenerationArguments]) -> Stream:
        """Return the completion of one prompt as a stream of pieces of text."""
        requests = self.requests(prompt, **arguments)
        if len(requests) != 1:
            raise ModelLinkError(f"a stream has one completion, not {len(requests)}",
                                 fix="use generate, or several streams")
        if requests[0].beams is not None:
            raise ModelLinkError("beam search cannot be streamed: its result is known only at the end",
                                 fix="use generate")
        return Stream(self, requests[0])

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, show: bool = False,
                      ) -> list[tuple[float, bool]]:
        """Return how likely continuations are.

        Args:
            pairs: (token ids of a context, token ids of its continuation); a separator such as a space must
                be part of one of them.
            show: show progress on stderr.

        Returns:
            (sum of the log-probabilities of the continuation's tokens in nats, whether greedy decoding would
            produce it), in the order of the pairs.
        """
        return [(sum(found.logprobs), found.greedy) for found in self._likelihoods(pairs, show)]

    def score(self, windows: Sequence[Sequence[int]], *, show: bool = False) -> list[list[float]]:
        """Return the negative log-likelihood in nats of each token of each window but the first, given those
        before it."""
        pairs = [(window[:1], window[1:]) for window in windows]
        return [[-value for value in found.logprobs] for found in self._likelihoods(pairs, show)]

    def _likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
                     show: bool) -> list[ContinuationLikelihood]:
        for number, (context, continuation) in enumerate(pairs):
            check_ids(context, self.spec, f"context {number}")
            check_ids(continuation, self.spec, f"continuation {number}")
            if (length := len(context) + len(continuation) - 1) > self.spec.max_position_embeddings:
                raise ModelLinkError(f"pair {number} has {length + 1} tokens; one token less must fit into "
                                     f"the model's maximum length of {self.spec.max_position_embeddings}",
                                     fix="shorten the context")
        with Work("scoring", len(pairs), unit="texts", show=show) as work:
            return self._scorer.likelihoods(pairs, work.advance)


class Stream(Iterator[str]):
    """The text of a completion in pieces, which never split a character and never contain a part of a stop
    string."""

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        self._completion = Completion.start(request, engine.tokenizer)
        self._pieces = self._run(engine.batch())

    def _run(self, batch: ContinuousBatch) -> Iterator[str]:
        batch.add(self._completion)
        try:
            while not batch.idle:
                for _, piece in batch.step():
                    yield piece
        finally:
            batch.remove(self._completion)

    def __next__(self) -> str:
        return next(piece for piece in self._pieces if piece)

    def cancel(self) -> None:
        """End the stream after the current pass; safe in a signal handler. On several ranks the first rank's
        call counts."""
        self._completion.cancelled = True

    @property
    def generation(self) -> Generation:
        """The finished completion, after the last piece."""
        if self._completion.finish_reason is None:
            raise ModelLinkError("the stream is not finished", fix="read the remaining pieces first")
        return self._completion.generation()
