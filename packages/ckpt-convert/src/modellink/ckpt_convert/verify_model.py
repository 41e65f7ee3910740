# SPDX-License-Identifier: Apache-2.0
"""Loading the output in transformers: the second part of `--verify`, if it is installed (the extra
`[verify]`).

The model's class is built from config.json on `meta`, which needs no memory, and must have exactly the
tensors of the output under Hugging Face names, with their shapes. If there is enough memory, the model is
loaded from the source and from the output, and both must give the same logits for a few tokens, bit by bit.

Not here: code that comes with a model (families without a class in transformers are skipped with a note), and
comparing all values (verify.py), which does not need transformers.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.formats.huggingface import is_huggingface
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import inverse
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage.tensors import torch_dtype
from modellink.ckpt_convert.streams import iter_hf_tensors
from modellink.kernels.errors import InternalError

if TYPE_CHECKING:
    import torch

TOKENS = 8
SHARE = 0.5  # of the free memory that a model may use


def check_model(source: Checkpoint, target: Checkpoint) -> str:
    """Compare `target` with the family's class in transformers, and its logits with those of `source`; return
    a report.

    Raises:
        InternalError: a tensor is missing, left over or of another shape, or a logit differs.
    """
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed, so the model was not loaded; install the extra [verify]"
    if target.adapter:
        return "an adapter is not a model that transformers could load"
    import transformers

    if Config.load(target.companions).get("model_type") not in transformers.CONFIG_MAPPING:
        return f"transformers has no class for the family {target.family}"
    try:
        with _quiet(transformers):
            config: Any = transformers.AutoConfig.from_pretrained(target.companions, trust_remote_code=False)
            cls: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except Exception as error:  # its rules are stricter than ours
        return f"transformers does not accept the configuration: {' '.join(str(error).split())[:200]}"
    config._experts_implementation = "eager"  # faster ones need sizes that are multiples of something
    try:
        with _quiet(transformers):
            return _compared(source, target, cls, config)
    except InternalError:
        raise
    except Exception as error:  # in its own code
        return f"transformers could not load or run {cls.__name__}: {type(error).__name__}: {str(error).splitlines()[0]}"


def _compared(source: Checkpoint, target: Checkpoint, cls: Any, config: Any) -> str:
    names = _check_names(target, cls, config)
    done = f"transformers: {cls.__name__} has these {names} tensors"
    dtype = torch_dtype(target.main_kind)
    need, free = sum(prod(tensor.shape) * dtype.itemsize for tensor in target.tensors.values()), _free()
    if need > SHARE * free:
        return f"{done}; it needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free, so no logits were compared"
    mine, theirs = (_logits(checkpoint, cls, config, dtype) for checkpoint in (source, target))
    unequal = (mine != theirs).nonzero()
    if not mine.isfinite().all():
        return f"{done}; its logits are not finite, not even from the source"
    if len(unequal):
        raise InternalError(f"logits differ, by at most {(mine - theirs).abs().max().item():.3g}, first at "
                            f"token "
                            f"{unequal[0][0].item()}, id {unequal[0][1].item()}", where=target.folder)
    return f"{done} and gives the same logits from source and target"


def _check_names(target: Checkpoint, cls: Any, config: Any) -> int:
    """Compare names and shapes on `meta`, and return their number."""
    import torch

    with torch.device("meta"):
        model = cls(config)
    state = {name: tensor for name, tensor in model.state_dict().items()
             if name not in set(model.all_tied_weights_keys)}
    from transformers.core_model_loading import revert_weight_conversion

    theirs = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    ours = {name: found.shape for name, found in inverse(target.spec,
                                                         family_of(target.family).rules(target.spec)).items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise InternalError(f"{name} is {_shape(ours.get(name))} in the output, but "
                                f"{_shape(theirs.get(name))} in "
                                f"{cls.__name__} of transformers", where=target.folder)
    return len(ours)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _logits(checkpoint: Checkpoint, cls: Any, config: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits [token, id] of the first tokens of the vocabulary."""
    import torch

    if is_huggingface(checkpoint.folder) and not checkpoint.merged:
        model, report = cls.from_pretrained(checkpoint.folder, config=config, dtype=dtype,
                                            output_loading_info=True)
    else:
        state = dict(iter_hf_tensors(checkpoint))
        model, report = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype,
                                            output_loading_info=True)
    wrong = [*report["missing_keys"], *report["unexpected_keys"],
             *(key[0] for key in report["mismatched_keys"])]
    if wrong:
        raise InternalError(f"transformers could not load {sorted(wrong)[0]}", where=checkpoint.folder)
    tokens = torch.arange(1, TOKENS + 1)[None] % checkpoint.spec.vocab_size
    with torch.no_grad():
        return model.eval()(tokens).logits[0].float()  # type: ignore[no-any-return]


def _free() -> int:
    """Return the bytes of available memory."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; errors are reported here."""
    level, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
