# SPDX-License-Identifier: Apache-2.0
"""Adapters by canonical name, and the folders they are saved in and read from.

    decoder.layers.0.self_attention.linear_qkv.lora_A.weight  [r, in]
    decoder.layers.0.self_attention.linear_qkv.lora_B.weight  [out, r]

An adapter adds scale x B A to a linear (Hu et al. 2021, section 4.1). Every save also has them in PEFT's format.

    SAVE/lora.json                      rank, scale and target modules
    SAVE/iter_0000010/*.distcp          adapters, optimizer and progress, as in every training checkpoint
    SAVE/iter_0000010/peft/             the same adapters as a PEFT folder

Not here: the modules (lora.py), Hugging Face names and merging (ckpt_convert).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dist
from torch import Tensor

from modellink.ckpt_convert import peft
from modellink.ckpt_convert.adapter import SAVED_FILE, SAVED_FOLDER, AdapterConfig
from modellink.ckpt_convert.families import NO_FORM
from modellink.ckpt_convert.iterations import last_complete
from modellink.ckpt_convert.lora import A, B, adapter_weights
from modellink.ckpt_convert.manifest import Manifest
from modellink.ckpt_convert.megatron.distributed import STACKED, refuse_unknown_names
from modellink.ckpt_convert.peft_files import is_peft
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import EXPERTS, Weight
from modellink.core.adapters.targets import targets
from modellink.core.config import LoraConfig
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json, write_json


def tensors_of(spec: ModelSpec, lora: LoraConfig, given: Mapping[str, Tensor], seed: int) -> dict[str, tuple[Weight, Tensor]]:
    """Every full A and B by name, and how tensor parallelism shards it.

    The A of a column-parallel linear and the B of a row-parallel one are replicated. Without `given`, A is random, the same at
    every layout, and B is 0.
    """
    made: dict[str, Tensor] = dict(given)
    for name, weight in {} if given else targets(spec, lora).items():
        rows, columns = weight.shape
        module = name.removesuffix(".weight")
        made[module + A], made[module + B] = initial(name, (lora.lora_r, columns), seed), torch.zeros(rows, lora.lora_r)
    table = adapter_weights(spec, {name: tuple(tensor.shape) for name, tensor in made.items()}, "--lora-load")
    return {name: (table[name], tensor) for name, tensor in made.items()}


def initial(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """A random A [r, in] for the weight `name`, uniform as in PEFT."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)


def write_description(folder: Path, lora: LoraConfig) -> None:
    """Write lora.json into --save."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SAVED_FILE, _described(lora.lora_r, lora.lora_alpha, lora.lora_use_rslora, lora.modules))


def write_peft(iteration: Path, manifest: Manifest, lora: LoraConfig, base: Path) -> None:
    """Write the adapters of an iteration as a PEFT folder inside it, if the model has a Hugging Face format."""
    if manifest.family != NO_FORM:
        config = AdapterConfig(lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_use_rslora)
        tensors = read_iteration(iteration, manifest.spec)
        peft.write_peft(iteration / SAVED_FOLDER, manifest.spec, manifest.family, tensors, config, base=str(base),
                        overwrite=True)


def read_iteration(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The full adapters in an iteration's folder, by canonical name."""
    refuse_unknown_names(folder)  # PyTorch unpickles the metadata unchecked
    reader = torch_dist.FileSystemReader(folder)
    entries: dict[str, Any] = {name: entry for name, entry in reader.read_metadata().state_dict_metadata.items()
               if name.startswith("decoder.") and name.endswith((A, B))}
    state: dict[str, Any] = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    torch_dist.load(state, storage_reader=reader, no_dist=True)
    found = {}
    for name, tensor in state.items():
        layer, stacked, inside = name.partition(STACKED)
        if stacked:
            for number in range(spec.num_experts or 0):
                found[f"{layer}mlp.{EXPERTS}{number}.{inside}"] = tensor[number]
        else:
            found[name] = tensor
    return found


def read(folder: Path, source: Checkpoint, step: int | None = None) -> dict[str, Tensor]:
    """The adapters of a PEFT folder, or of iteration `step` (default: the last complete one) of a saved run."""
    if is_peft(folder):
        return peft.read_peft(folder, source.spec, source.family)[1]
    return read_iteration(last_complete(folder, step), source.spec)


def check(folder: Path, lora: LoraConfig, source: Checkpoint) -> None:
    """Raise ModelLinkError if the adapters of a folder do not fit the options or the model."""
    if is_peft(folder):
        config, tensors = peft.read_peft(folder, source.spec, source.family)
        theirs = _described(config.r, config.alpha, config.rslora, sorted({name.split(".")[-3] for name in tensors
                                                                           if name.endswith(A)}))
    elif (folder / SAVED_FILE).is_file():
        theirs = read_json(folder / SAVED_FILE)
    else:
        raise ModelLinkError("the folder holds no adapters", where=f"--lora-load {folder}",
                             fix=f"give the --save folder of a LoRA run, which contains {SAVED_FILE}, or a PEFT folder")
    ours = _described(lora.lora_r, lora.lora_alpha, lora.lora_use_rslora, lora.modules)
    flags = {"r": "--lora-r", "alpha": "--lora-alpha", "use_rslora": "--lora-use-rslora",
             "target_modules": "--lora-target-modules"}
    for name, flag in flags.items():
        if theirs.get(name) != ours[name]:
            raise ModelLinkError(f"{flag} is {_text(ours[name])} and {_text(theirs.get(name))} in the adapters",
                                 where=f"{flag}, {folder}", fix="use the value of the adapters")


def _described(r: int, alpha: float, rslora: bool, modules: Sequence[str]) -> dict[str, Any]:
    return {"r": r, "alpha": alpha, "use_rslora": rslora, "target_modules": list(modules)}


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
