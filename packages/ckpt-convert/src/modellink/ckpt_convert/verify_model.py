"""What transformers makes of a conversion: the second part of `--verify`, where it is installed (the extra `[verify]`).

The model's class is built from config.json on `meta`, which costs no memory, and must have exactly the tensors that the target
has under Hugging Face names, with their shapes. Where there is memory for the model, it is filled from the source and from the
target, and both must give the same logits for a few tokens, bit by bit.

Not here: code that comes with a model (a family that transformers does not have is passed over, with a note), and comparing all
numbers (verify.py), which needs no transformers.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import inverse
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.streams import iter_hf_tensors
from modellink.kernels.errors import InternalError

TOKENS = 8
SHARE = 0.5  # of the free memory that a model may take


def check_model(source: Checkpoint, target: Checkpoint) -> str:
    """Compare `target` with the family's class in transformers, and its logits with those of `source`. Returns what was done.

    Raises:
        InternalError: a tensor is missing, left over or of another shape, or a logit differs.
    """
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed, so its model was not built; the extra [verify] brings it"
    if target.adapter:
        return "an adapter is no model that transformers could build"
    import transformers

    if Config.load(target.companions).get("model_type") not in transformers.CONFIG_MAPPING:
        return f"transformers has no class for the family {target.family}"
    try:
        with _quiet(transformers):
            config: Any = transformers.AutoConfig.from_pretrained(target.companions, trust_remote_code=False)
            cls: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except Exception as error:  # of the peer, whose rules are stricter
        return f"transformers does not read its configuration: {' '.join(str(error).split())[:200]}"
    config._experts_implementation = "eager"  # faster ones want sizes that are multiples of something
    try:
        with _quiet(transformers):
            return _compared(source, target, cls, config)
    except InternalError:
        raise
    except Exception as error:  # of the peer, whose model this is
        return f"transformers could not build or run {cls.__name__}: {type(error).__name__}: {str(error).splitlines()[0]}"


def _compared(source: Checkpoint, target: Checkpoint, cls: Any, config: Any) -> str:
    names = _check_names(target, cls, config)
    done = f"transformers: {cls.__name__} has these {names} tensors"
    need, free = sum(prod(tensor.shape) * target.main_dtype.itemsize for tensor in target.tensors.values()), _free()
    if need > SHARE * free:
        return f"{done}; it needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free, so no logits were compared"
    mine, theirs = (_logits(checkpoint, cls, config, target.main_dtype) for checkpoint in (source, target))
    unequal = (mine != theirs).nonzero()
    if not mine.isfinite().all():
        return f"{done}; its logits are not finite, from the source too"
    if len(unequal):
        raise InternalError(f"logits differ, by at most {(mine - theirs).abs().max().item():.3g}, first of token "
                            f"{unequal[0][0].item()} at id {unequal[0][1].item()}", where=target.folder)
    return f"{done} and gives the same logits from source and target"


def _check_names(target: Checkpoint, cls: Any, config: Any) -> int:
    """Compare names and shapes on `meta`; returns how many there are."""
    with torch.device("meta"):
        model = cls(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in set(model.all_tied_weights_keys)}
    from transformers.core_model_loading import revert_weight_conversion

    theirs = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    ours = {name: found.shape for name, found in inverse(target.spec, family_of(target.family).rules(target.spec)).items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise InternalError(f"{name} is {_shape(ours.get(name))} here, and {_shape(theirs.get(name))} in {cls.__name__} of "
                                "transformers", where=target.folder)
    return len(ours)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _logits(checkpoint: Checkpoint, cls: Any, config: Any, dtype: torch.dtype) -> torch.Tensor:
    """Logits [token, id] of the first tokens of the vocabulary."""
    if checkpoint.format == "Hugging Face" and not checkpoint.merged:
        model, told = cls.from_pretrained(checkpoint.folder, config=config, dtype=dtype, output_loading_info=True)
    else:
        state = dict(iter_hf_tensors(checkpoint))
        model, told = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *(key[0] for key in told["mismatched_keys"])]
    if wrong:
        raise InternalError(f"transformers could not load {sorted(wrong)[0]}", where=checkpoint.folder)
    tokens = torch.arange(1, TOKENS + 1)[None] % checkpoint.spec.vocab_size
    with torch.no_grad():
        return model.eval()(tokens).logits[0].float()  # type: ignore[no-any-return]


def _free() -> int:
    """Bytes of memory that are free or can be made so."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and warnings of transformers; what is wrong is found out here."""
    level, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
