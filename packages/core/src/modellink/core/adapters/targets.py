"""Which linears of a model get an adapter. Imports no torch."""

from __future__ import annotations

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import Weight, weights
from modellink.core.config import LoraConfig
from modellink.kernels.errors import ModelLinkError, near

HF_NAMES = {"q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv", "qkv_proj": "linear_qkv",
            "c_attn": "linear_qkv", "W_pack": "linear_qkv", "wqkv": "linear_qkv", "o_proj": "linear_proj", "wo": "linear_proj",
            "gate_proj": "linear_fc1", "up_proj": "linear_fc1", "w1": "linear_fc1", "w3": "linear_fc1", "c_fc": "linear_fc1",
            "down_proj": "linear_fc2", "w2": "linear_fc2", "c_proj": "linear_proj or linear_fc2",
            "kv_a_proj_with_mqa": "linear_kv_down_proj", "kv_b_proj": "linear_kv_up_proj", "q_a_proj": "linear_q_down_proj",
            "q_b_proj": "linear_q_up_proj"}
"""Names of linears in transformers' model classes -> ours, for suggestions. A linear of ours may combine several of theirs."""
EVERY = ("all", "all-linear", "all_linear")
"""What other tools write for all linears."""


def targets(spec: ModelSpec, lora: LoraConfig) -> dict[str, Weight]:
    """The weights that get an adapter, by canonical name.

    Raises:
        ModelLinkError: the model has no such linear.
    """
    linears = {name: weight for name, weight in weights(spec).items() if ".linear_" in name and name.endswith(".weight")}
    known = sorted({linear(name) for name in linears})
    for module in lora.modules:
        if module not in known:
            raise ModelLinkError(f"the model has no linear {module}", where="--lora-target-modules",
                                 fix=_suggestion(module, known))
    return {name: weight for name, weight in linears.items() if linear(name) in lora.modules}


def _suggestion(module: str, known: list[str]) -> str:
    if module in EVERY:
        return f"did you mean {' '.join(known)}?"
    if module in HF_NAMES:
        return f"did you mean {HF_NAMES[module]}?"
    return near(module, known) or f"use some of {', '.join(known)}"


def linear(name: str) -> str:
    """The name of a weight's linear within its layer, e.g. linear_qkv."""
    return name.split(".")[-2]
