"""A checkpoint on this machine, computed by modellink-infer, which is imported when the first model is opened.

Of several ranks the first one drives: it hands every batch to the others, which do nothing but `follow`. So journals, files
and progress are its business alone, and no rank can come to another opinion of what is left to do.
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

    Opening one checks files, layout and device; the weights are read when the first likelihood is asked for.

    Args:
        path: a Hugging Face folder, or a Megatron-Core or torch_dist checkpoint.
        layout: the tensor, pipeline and expert parallel sizes; there must be as many processes.
        device: `auto` takes an NPU, else a CUDA GPU, else the CPU.
        dtype: None takes what most of the checkpoint's weights have.
        tokenizer: a Hugging Face folder, for a checkpoint that does not carry its own.
        family: the family where the checkpoint does not say it.
        chat: the template around chats, a prompt type of data-prep or `hf-chat-template`.
        batch_size: how many texts are written together.

    Raises:
        ModelLinkError: modellink-infer is not installed, the checkpoint cannot be opened or has no tokenizer, a layout that
            does not fit, a template that is not there.
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
            raise ModelLinkError("the checkpoint carries no tokenizer", where=path,
                                 fix="give the Hugging Face folder of the model with --tokenizer-name-or-path")
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
        """The log-probability of a whole text, in windows of the longest sequence, one after the other."""
        return float(sum(value for value, _ in self._compute("likelihoods", self.encode.windows(text))))

    def load(self) -> None:
        """Read the weights now, on every rank, so that nobody counts that among the time of the questions."""
        if self._engine is None:
            from modellink.infer import Engine
            # The compiled step writes about twice as fast. In fp32 it differs from the model in the last digits, as layouts do;
            # in bf16 by what the model rounds and it does not, and then the answers are to be the model's own. Whether it pays
            # is not measured: two runs on one machine are to be computed the same way.
            self._engine = Engine(self._plan, batch_size=self.batch_size, show=True, native=self._dtype == "float32")

    def follow(self) -> None:
        """What every rank but the first does: compute what the first one asks for, until it closes."""
        while (found := self._compute(None, None)) is not None:
            for _ in found:  # texts are written as somebody takes them
                pass

    def close(self) -> None:
        """Let the other ranks go; the first rank calls it after its work."""
        if self.ranks > 1:
            self._compute(None, [])

    def _compute(self, what: str | None, asked: list[Any] | None) -> Any:
        """What is asked for, on a following rank (asked None) what the first rank asks for; None at the end of the work."""
        self.load()
        if self.ranks > 1:
            import torch.distributed as dist
            box: list[Any] = [what, asked]
            dist.broadcast_object_list(box, src=0, device=self._plan.device.torch)
            what, asked = box
        assert self._engine is not None
        return _WORK[what](self._engine, asked or []) if what else None


def _texts(engine: Engine, asked: list[Any]) -> Iterator[tuple[int, str]]:
    """Each text with its number, as it is finished; the next one begins in its place."""
    from modellink.infer.request import Completion
    batch = engine.batch()
    under_way: dict[int, tuple[int, Completion]] = {}  # by identity: answers are compared by what they hold
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
    """Raise a message with the command that helps where modellink-infer is not installed."""
    if importlib.util.find_spec("modellink.infer") is None:
        raise ModelLinkError("a local model needs modellink-infer, which is not installed", where="--load",
                             fix='python -m pip install "modellink-eval[local]"; from a clone: python -m pip install '
                             "./packages/kernels ./packages/ckpt-convert ./packages/data-prep ./packages/core ./packages/infer")
