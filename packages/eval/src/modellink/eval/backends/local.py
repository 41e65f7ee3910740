# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on this machine, run by modellink-infer, which is imported when the first model is opened.

With several ranks, the first one broadcasts every batch to the others, which only `follow`. Journals, files and progress belong
to the first rank, so the ranks cannot disagree about the remaining work.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modellink.eval.backends.backend import Completion, GenerationRequest, Likelihood, LikelihoodRequest
from modellink.eval.backends.fingerprint import fingerprint
from modellink.eval.backends.tokens import Encoder
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    from modellink.infer import Engine

MODEL_FILES = ("config.json", "modellink.json", "tokenizer.json", "tokenizer_config.json")
LIBRARIES = ("megatron-core", "torch", "tokenizers")


class LocalBackend:
    """Any checkpoint modellink-infer can open, at any layout.

    The constructor checks files, layout and device; the weights are read on first use.

    Args:
        path: a Hugging Face folder, or a Megatron-Core or torch-dist checkpoint.
        layout: tensor, pipeline and expert parallel sizes; the number of processes must match.
        device: `auto`: an NPU, else a CUDA GPU, else the CPU.
        dtype: precision. Default: that of most weights of the checkpoint.
        tokenizer: a Hugging Face folder, for a checkpoint without a tokenizer.
        family: model family, for a checkpoint that does not name it.
        chat: chat template, a prompt type of data-prep or `hf-chat-template`.
        batch_size: number of texts generated together.

    Raises:
        ModelLinkError: modellink-infer is not installed, the checkpoint cannot be opened or has no tokenizer, the layout does not
            fit, or the template is unknown.
    """

    def __init__(self, path: Path | str, *, layout: ParallelLayout = ParallelLayout(),
                 device: Literal["auto", "cpu", "cuda", "npu"] = "auto",
                 dtype: Literal["float32", "bfloat16", "float16"] | None = None, tokenizer: Path | str | None = None,
                 family: str | None = None, chat: str | None = None, batch_size: int = 16) -> None:
        require_infer()
        from modellink.infer.plan import make_load_plan
        index = int(os.environ.get("LOCAL_RANK", "0"))
        self._plan = make_load_plan(path, layout=layout, device=device, index=index, dtype=dtype, family=family,
                                    tokenizer=tokenizer)
        if self._plan.tokenizer is None:
            raise ModelLinkError("the checkpoint has no tokenizer", where=path,
                                 fix="pass the Hugging Face folder of the model as --tokenizer-name-or-path")
        self.ranks, self.batch_size = layout.world_size, batch_size
        self.encode = Encoder(self._plan.tokenizer, self._plan.spec.max_position_embeddings, chat)
        self._dtype = str(self._plan.dtype).removeprefix("torch.")
        self._engine: Engine | None = None

    def describe(self) -> Mapping[str, Any]:
        import modellink.infer
        source, dtype = self._plan.source, self._dtype
        folders = dict.fromkeys((source.folder, source.companions, self.encode.tokenizer.folder))
        companions = {folder / name for folder in folders for name in MODEL_FILES if (folder / name).is_file()}
        return {"checkpoint": source.folder.name, "family": source.family, "stored as": source.describe(), "dtype": dtype,
                "fingerprint": fingerprint({*source.files(), *companions}, dtype),
                "versions": {"modellink-infer": modellink.infer.__version__} | {name: version(name) for name in LIBRARIES}}

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        pairs = self.encode.pairs(requests)
        found = self._compute("likelihoods", [pair[:2] for pair in pairs])
        return [Likelihood(logprob, greedy, pair.dropped) for (logprob, greedy), pair in zip(found, pairs, strict=True)]

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        prompts = [self.encode.prompt(request) for request in requests]
        asked = [(ids, {"max_new_tokens": request.max_tokens, "stop": [*request.until, *self.encode.stop_ids],
                        **({"temperature": request.temperature, "top_p": request.top_p, "top_k": 0, "seed": request.seed}
                           if request.temperature else {"do_sample": False})})
                 for (ids, _), request in zip(prompts, requests, strict=True)]
        for number, text in self._compute("texts", asked):
            yield number, Completion(text, prompts[number][1])

    def rolling(self, text: str) -> float:
        """Return the log-probability of an entire text, in consecutive windows of the maximum sequence length."""
        return float(sum(value for value, _ in self._compute("likelihoods", self.encode.windows(text))))

    def load(self) -> None:
        """Read the weights on every rank now, so that loading does not count as time of the questions."""
        if self._engine is None:
            from modellink.infer import Engine
            # The compiled step generates about twice as fast. In fp32 it differs from the model only in the last digits, as
            # layouts do. In bf16 it skips roundings of the model, so the model is used. Speed is not measured to decide, so that
            # two runs on one machine compute the same way.
            self._engine = Engine(self._plan, batch_size=self.batch_size, show=True, native=self._dtype == "float32")

    def follow(self) -> None:
        """Run on all ranks but the first: compute the batches of the first rank until it closes."""
        while (found := self._compute(None, None)) is not None:
            for _ in found:  # texts are generated as the iterator is consumed
                pass

    def close(self) -> None:
        """Release the other ranks; the first rank calls this at the end."""
        if self.ranks > 1:
            self._compute(None, [])

    def _compute(self, what: str | None, asked: list[Any] | None) -> Any:
        """Compute a batch; on a following rank (`asked` is None) the batch of the first rank. Return None at the end."""
        self.load()
        if self.ranks > 1:
            import torch.distributed as dist
            box: list[Any] = [what, asked]
            dist.broadcast_object_list(box, src=0, device=self._plan.device.torch)
            what, asked = box
        assert self._engine is not None
        return _WORK[what](self._engine, asked or []) if what else None


def _texts(engine: Engine, asked: list[Any]) -> Iterator[tuple[int, str]]:
    """Yield each text with its number when it is finished; the next request then takes its slot."""
    from modellink.infer.request import Completion
    batch = engine.batch()
    under_way: dict[int, tuple[int, Completion]] = {}  # by identity, since answers compare by value
    left = iter(enumerate(asked))
    try:
        while True:
            for number, (ids, options) in islice(left, engine.batch_size - len(under_way)):
                (request,) = engine.requests(ids, **options)
                answer = Completion.start(request, engine.tokenizer)
                under_way[id(answer)] = number, answer
                batch.add(answer)
            if not under_way:
                return
            for answer, _ in batch.step():
                if answer.finish_reason is not None:
                    yield under_way.pop(id(answer))[0], answer.generation().text
    finally:
        for _, answer in under_way.values():
            batch.remove(answer)


_WORK: dict[str, Callable[[Any, list[Any]], Iterable[Any]]] = {
    "likelihoods": lambda engine, pairs: engine.loglikelihood(pairs), "texts": _texts}


def require_infer() -> None:
    """Raise ModelLinkError with the install command if modellink-infer is not installed."""
    if importlib.util.find_spec("modellink.infer") is None:
        raise ModelLinkError("a local model needs modellink-infer, which is not installed", where="--load",
                             fix='python -m pip install "modellink-eval[local]"; from a clone: python -m pip install '
                             "./packages/kernels ./packages/ckpt-convert ./packages/data-prep ./packages/core ./packages/infer")
