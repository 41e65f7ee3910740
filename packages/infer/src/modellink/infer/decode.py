"""The generation loop over one batch: the prompts in one pass, then a token for every row at a time.

A row that is done leaves the batch. Every tensor-parallel rank runs the same loop; the first one's choice of tokens, and its
wish to stop, hold for all. Not here: requests that join a running batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from modellink.infer.network import Network
from modellink.infer.request import Answer
from modellink.infer.sampling import Chooser

Cancelled = Callable[[], bool]


def never() -> bool:
    return False


@torch.inference_mode()
def decode(network: Network, answers: Sequence[Answer], cancelled: Cancelled = never) -> Iterator[tuple[int, str]]:
    """Fill the answers; yields (index of the answer, new piece of its text) as tokens come, also when the piece is empty."""
    rows = list(range(len(answers)))  # the answer each row of the batch belongs to
    choosers = [Chooser(answer.request.sampling, network.device) for answer in answers]
    prompts = [answer.request.prompt for answer in answers]
    cache = network.cache(len(rows), max(len(a.request.prompt) + a.request.max_new_tokens - 1 for a in answers))
    longest = max(map(len, prompts))
    last = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=network.device)
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    logits = network.logits(padded, cache.state([0] * len(rows), longest, last))[:, -1]
    while True:
        tokens = _choose(logits, [choosers[row] for row in rows])
        *chosen, stop = network.agree([*tokens.tolist(), int(cancelled())])
        logprobs = _logprobs(logits, chosen) if any(answers[row].request.logprobs for row in rows) else [None] * len(rows)
        for row, token, logprob in zip(rows, chosen, logprobs, strict=True):
            piece = answers[row].push(token, logprob)
            if stop and answers[row].finish_reason is None:
                piece += answers[row].end("cancelled")
            yield row, piece
        going = [place for place, row in enumerate(rows) if answers[row].finish_reason is None]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[place] for place in going]
        newest = torch.tensor([answers[row].token_ids[-1:] for row in rows])
        logits = network.logits(newest, cache.state([answers[row].length - 1 for row in rows], 1))[:, -1]


def _choose(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    if all(chooser.sampling.greedy for chooser in choosers):
        return logits.argmax(-1)
    return torch.stack([chooser(row) for chooser, row in zip(choosers, logits, strict=True)])


def _logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """[batch, vocabulary] -> the log-probability of each row's token."""
    index = torch.tensor(tokens, device=logits.device)[:, None]
    found: list[float] = logits.log_softmax(-1).gather(-1, index)[:, 0].tolist()
    return found
