"""Which adapters a model has, by canonical name, how ranks hold them, and the folder they are saved in.

    decoder.layers.0.self_attention.linear_qkv.lora_A.weight  [r, in]
    decoder.layers.0.self_attention.linear_qkv.lora_B.weight  [out, r]

What a linear adds is scale x B A (Hu et al. 2021, section 4.1). Not here: modules (lora.py), Hugging Face names (ckpt_convert).
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import Weight, weights
from modellink.core.config import LoraConfig
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json, write_json

FILE = "lora.json"


def targets(spec: ModelSpec, lora: LoraConfig) -> dict[str, Weight]:
    """The weights that get an adapter.

    Raises:
        ModelLinkError: the model has no such linear.
    """
    linears = {name: weight for name, weight in weights(spec).items() if ".linear_" in name and name.endswith(".weight")}
    known = sorted({linear(name) for name in linears})
    for module in lora.modules:
        if module not in known:
            raise ModelLinkError(f"the model has no linear {module}", where="--lora-target-modules",
                                 fix=f"it has {', '.join(known)}")
    return {name: weight for name, weight in linears.items() if linear(name) in lora.modules}


def linear(name: str) -> str:
    """The name of a weight's linear inside its layer."""
    return name.split(".")[-2]


def pair(weight: Weight, rank: int) -> tuple[Weight, Weight]:
    """A and B of a weight: what is cut over tensor-parallel ranks follows it on one side, and is whole on the other."""
    rows, columns = weight.shape
    whole_a, whole_b = Weight((rank, columns), "replicated"), Weight((rows, rank), "replicated")
    if weight.split == "row":
        return Weight((rank, columns), "row"), whole_b
    return whole_a, whole_b if weight.split == "replicated" else Weight((rows, rank), weight.split)


def initial(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """A random A [r, in] for the weight `name`, the same at every layout; uniform as PEFT begins. B begins with 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)


def describe(lora: LoraConfig) -> dict[str, Any]:
    """What adapters say of themselves in `lora.json`."""
    return {"r": lora.lora_r, "alpha": lora.lora_alpha, "use_rslora": lora.lora_use_rslora, "target_modules": list(lora.modules)}


def write_description(folder: Path, lora: LoraConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, describe(lora))


def check_description(folder: Path, lora: LoraConfig) -> None:
    """Raise when the adapters of a folder are not those of the options."""
    if not (folder / FILE).is_file():
        raise ModelLinkError("the folder holds no adapters that training saved", where=f"--lora-load {folder}",
                             fix=f"give the --save folder of a run with adapters, in which {FILE} lies")
    theirs, ours = read_json(folder / FILE), describe(lora)
    flags = {"r": "--lora-r", "alpha": "--lora-alpha", "use_rslora": "--lora-use-rslora",
             "target_modules": "--lora-target-modules"}
    for name, flag in flags.items():
        if theirs.get(name) != ours[name]:
            raise ModelLinkError(f"{flag} is {_text(ours[name])} and {_text(theirs.get(name))} in the adapters",
                                 where=f"{flag}, {folder / FILE}", fix="give what they were made with")


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
