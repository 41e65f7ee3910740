# SPDX-License-Identifier: Apache-2.0
"""Which modules a LoRA adapter belongs to, in every spelling: Megatron-Core's, Megatron-Legacy's, Hugging
Face's.

Modules are named by their last part, e.g. `linear_qkv`. Not here: the adapter's tensors (lora.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.lora import LORA, is_linear
from modellink.ckpt_convert.megatron.legacy import MODULES
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError, near

HUGGING_FACE: dict[str, tuple[str, ...]] = {
    "q_proj": ("linear_qkv",), "k_proj": ("linear_qkv",), "v_proj": ("linear_qkv",), "qkv_proj": ("linear_qkv",),
    "W_pack": ("linear_qkv",), "wqkv": ("linear_qkv",), "c_attn": ("linear_qkv",), "o_proj": ("linear_proj",),
    "wo": ("linear_proj",), "gate_proj": ("linear_fc1",), "up_proj": ("linear_fc1",), "gate_up_proj": ("linear_fc1",),
    "w1": ("linear_fc1",), "w3": ("linear_fc1",), "c_fc": ("linear_fc1",), "down_proj": ("linear_fc2",),
    "w2": ("linear_fc2",), "c_proj": ("linear_proj", "linear_fc2"), "q_a_proj": ("linear_q_down_proj",),
    "q_b_proj": ("linear_q_up_proj",), "kv_a_proj_with_mqa": ("linear_kv_down_proj",), "kv_b_proj": ("linear_kv_up_proj",)}
"""The usual names of a model's linear modules in Hugging Face classes -> Megatron-Core's."""
EVERY = ("all", "all-linear", "all_linear")
"""What other programs call all linear modules."""
LEGACY = {theirs.rpartition(".")[2]: ours.rpartition(".")[2] for ours, theirs in MODULES.items()}
"""Megatron-Legacy's names -> Megatron-Core's."""


def modules_of(spec: ModelSpec, family: str) -> dict[str, tuple[str, ...]]:
    """Return the names of this model's linear modules in its Hugging Face class -> Megatron-Core's."""
    known = weights(spec)
    found: dict[str, tuple[str, ...]] = {}
    for canonical, pieces in family_of(family).rules(spec).items():
        if not is_linear(canonical, known[canonical]):
            continue
        ours = canonical.removesuffix(".weight").rpartition(".")[2]
        for piece in pieces:
            theirs = piece.name.removesuffix(".weight").rpartition(".")[2]
            found[theirs] = tuple(dict.fromkeys([*found.get(theirs, ()), ours]))
    return found


def meant_modules(name: str, known: Collection[str], spec: ModelSpec | None = None,
                  family: str | None = None) -> str:
    """Return `did you mean ...?` for a name that is not one of the modules `known`, or an empty string.

    Args:
        name: as the user gave it, e.g. `q_proj`; names that stand for all linear modules suggest all of `known`.
        spec, family: of the model, if they are known: its own names come before the usual ones.
    """
    if name in EVERY:
        return f"did you mean {' '.join(known)}?"
    names = HUGGING_FACE | {theirs: (ours,) for theirs, ours in LEGACY.items()}
    if spec is not None and family is not None:
        names |= modules_of(spec, family)
    found = [module for module in names.get(name, ()) if module in known]
    return f"did you mean {' or '.join(found)}?" if found else near(name, known)


def check_targets(names: Iterable[str], given: Collection[str]) -> None:
    """Check that an adapter has exactly the modules that the user names, in Megatron-Core's or
    Megatron-Legacy's spelling.

    Args:
        names: canonical names of the adapter's tensors.
        given: names of modules. Empty: not checked.

    Raises:
        ModelLinkError: it has others.
    """
    if not given:
        return
    found = {name.rpartition(LORA)[0].rpartition(".")[2] for name in names}
    wanted = {LEGACY.get(name, name) for name in given}
    if found == wanted:
        return
    hints = [hint for name in sorted(wanted - found) if (hint := meant_modules(name, found))]
    raise ModelLinkError(f"the adapter has {', '.join(sorted(found))}, not {', '.join(sorted(wanted))}",
                         where="--lora-target-modules", fix=hints[0] if hints else None)
