# SPDX-License-Identifier: Apache-2.0
"""A model class for lm-evaluation-harness, so that its tasks run on any checkpoint of modellink-infer, including Megatron's.

    python -m modellink.eval.backends.harness --model modellink --model_args path=./checkpoint,dtype=float32 --tasks arc_easy

is `lm_eval` with an additional model; in Python, `harness_model()` returns the class. Needs `modellink-eval[harness]`; lm_eval is
imported on use. Limited to one process and no chat templates.
"""

from __future__ import annotations

import functools
from typing import Any

from modellink.eval.backends.backend import GenerationRequest, LikelihoodRequest
from modellink.eval.backends.local import LocalBackend
from modellink.kernels.errors import ModelLinkError, run_command

UNSAID = {"max_gen_toks": 256}  # the default of the harness
BATCH = 32


@functools.cache
def harness_model() -> type:
    """`lm_eval.api.model.LM` over a checkpoint, registered as `modellink`; its arguments are those of `LocalBackend`.

    Raises:
        ModelLinkError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ModelLinkError(f"lm-evaluation-harness cannot be imported: {error}", where="lm_eval",
                             fix='python -m pip install "modellink-eval[harness]"') from None

    @register_model("modellink")
    class ModelLinkLM(LM):  # type: ignore[misc]
        """Answers the requests of the harness; each is an `Instance` whose `args` are the request."""

        def __init__(self, path: str, batch_size: int | str = BATCH, device: str = "auto", max_batch_size: Any = None,
                     **options: Any) -> None:
            super().__init__()
            self.batch = int(batch_size) if str(batch_size).isdigit() else BATCH
            self.backend = LocalBackend(path, device=device or "auto", **options)  # type: ignore[arg-type]
            self.backend.load()

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            order = sorted(range(len(requests)), key=lambda number: requests[number].args[0])
            found: dict[int, tuple[float, bool]] = {}
            for start in range(0, len(order), self.batch * 4):
                chosen = order[start:start + self.batch * 4]
                answers = self.backend.loglikelihood([_request(*requests[number].args) for number in chosen])
                for number, one in zip(chosen, answers, strict=True):
                    found[number] = one.logprob, one.greedy
                    self.cache_hook.add_partial("loglikelihood", requests[number].args, found[number])
            return [found[number] for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Return log-probabilities of entire texts, in windows of the maximum sequence length."""
            return [self.backend.rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found = dict(self.backend.generate([_writing(*request.args) for request in requests]))
            return [found[number].text for number in range(len(requests))]
    return ModelLinkLM


def _request(context: str, continuation: str) -> LikelihoodRequest:
    """Move spaces at the end of the context to the continuation, as the harness does for its own models."""
    kept = context.rstrip()
    return LikelihoodRequest(kept, context[len(kept):] + continuation)


def _writing(context: str, options: dict[str, Any]) -> GenerationRequest:
    until = options.get("until") or []
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    longest = options.get("max_gen_toks") or options.get("max_new_tokens") or UNSAID["max_gen_toks"]
    return GenerationRequest(context, tuple([until] if isinstance(until, str) else until), int(longest), temperature,
                   float(options.get("top_p") or 1.0))


def main() -> None:
    """Run `lm_eval` with this model registered."""
    harness_model()
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()


if __name__ == "__main__":
    run_command(main)
