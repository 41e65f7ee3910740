# SPDX-License-Identifier: Apache-2.0
"""Describing a checkpoint without converting it: model, layout, tensors, sizes; for people and as JSON.

A checkpoint whose model is unknown (written by another program, no configuration given) is described by its
files only.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.megatron import ranks
from modellink.ckpt_convert.plan import size
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage.pickle import Inert
from modellink.ckpt_convert.storage.tensors import Assembled, Stored
from modellink.kernels.parallel import ParallelLayout

SHOWN = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
         "padded_vocab_size",
        "num_experts", "tensor_model_parallel_size", "pipeline_model_parallel_size",
         "expert_model_parallel_size", "iteration")


def inspect(source: Checkpoint) -> dict[str, Any]:
    """Return everything about a checkpoint except its data, ready for JSON: sizes in bytes, tensors by
    canonical name."""
    tensors = {name: _entry(tensor) for name, tensor in source.tensors.items()}
    return {"folder": str(source.folder), "format": source.format, "layout": str(source.layout),
            "num_layer_list": source.layout.num_layer_list, "iteration": source.iteration,
            "family": source.family, "prompt_type": source.prompt_type, "lora": source.lora,
            "spec": source.spec.to_dict(), "parameters": sum(prod(tensor.shape)
                                                             for tensor in source.tensors.values()),
            "bytes": sum(entry["bytes"] for entry in tensors.values()),
            "files": {str(path): path.stat().st_size for path in source.files()}, "tensors": tensors}


def inspect_ranks(folder: Path) -> dict[str, Any]:
    """Describe the files of a Megatron checkpoint of an unknown model: layout, arguments, tensors of the
    first rank."""
    found = ranks.load(folder)
    first, chunks = found.first, len(found.first.chunks)
    arguments: dict[str, Any] = {}
    if isinstance(first.arguments, Inert) and isinstance(first.arguments.state, dict):
        arguments = first.arguments.state
    tensors: dict[str, Stored] = {}
    for number, chunk in enumerate(first.chunks):
        tensors |= {f"model{number}.{name}" if chunks > 1 else name: stored for name, stored in chunk.items()}
    files = sorted({stored.path for content in found.contents.values() for chunk in content.chunks
                    for stored in chunk.values()})
    entries = {name: _entry(stored) for name, stored in tensors.items()}
    return {"folder": str(folder), "format": "Megatron, of an unknown model",
            "layout": str(ParallelLayout(tp=found.tp, pp=found.pp, vpp=chunks, ep=found.ep)),
            "iteration": None, "family": None, "spec": {name: arguments.get(name) for name in SHOWN},
            "parameters": None, "bytes": sum(entry["bytes"] for entry in entries.values()),
            "files": {str(path): path.stat().st_size for path in files}, "tensors": entries}


def _entry(tensor: Stored | Assembled) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": tensor.kind, "bytes": prod(tensor.shape) * tensor.itemsize}


def table(facts: dict[str, Any]) -> str:
    """Return the same as text for people; tensors that differ only in their layer number share a line."""
    known = facts["family"] is not None
    title = f"{facts['folder']}: {facts['format']}, {facts['layout']}"
    if facts["iteration"] is not None:
        title += f", iteration {facts['iteration']}"
    if facts.get("lora"):
        title += f", {facts['lora']}"
    if facts.get("num_layer_list"):
        title += f", layers {facts['num_layer_list']}"
    if known:
        content = f"family {facts['family']}, {facts['parameters']:,} parameters, {size(facts['bytes'])}"
    else:
        content = f"first rank {size(facts['bytes'])}"
    lines = [title, f"{content} in {len(facts['files'])} files", "",
             "model" if known else "arguments in the file"]
    lines += [f"  {name} = {value}" for name, value in facts["spec"].items() if value is not None]
    counts: dict[tuple[str, str], int] = {}
    for name, entry in facts["tensors"].items():
        general = ".".join("*" if part.isdigit() else part for part in name.split("."))
        key = general, f"{entry['shape']} {entry['dtype']}"
        counts[key] = counts.get(key, 0) + 1
    width = max(len(name) for name, _ in counts)
    lines += ["", f"{len(facts['tensors'])} tensors" + ("" if known else " of the first rank")]
    lines += [f"  {name:{width}}  {count:4} x {about}" for (name, about), count in counts.items()]
    return "\n".join(lines)
