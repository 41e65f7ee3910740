"""What a checkpoint is, without converting it: model, layout, tensors, sizes; for people and as JSON.

One whose model nobody can tell (made elsewhere, no configuration given) is described by its files alone.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.formats import ranks
from modellink.ckpt_convert.formats.pickle import Inert
from modellink.ckpt_convert.formats.tensors import Stored
from modellink.ckpt_convert.plan import size
from modellink.ckpt_convert.source import Checkpoint
from modellink.kernels.parallel import ParallelLayout

TOLD = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "padded_vocab_size",
        "num_experts", "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "iteration")


def inspect(source: Checkpoint) -> dict[str, Any]:
    """Everything about a checkpoint but its numbers, ready for JSON; sizes in bytes, tensors under canonical names."""
    tensors = {name: _entry(tensor.shape, tensor.dtype) for name, tensor in source.tensors.items()}
    return {"folder": str(source.folder), "format": source.format, "layout": str(source.layout),
            "num_layer_list": source.layout.num_layer_list, "iteration": source.iteration, "family": source.family,
            "prompt_type": source.prompt_type, "lora": source.lora, "spec": source.spec.to_dict(),
            "parameters": sum(prod(tensor.shape) for tensor in source.tensors.values()),
            "bytes": sum(entry["bytes"] for entry in tensors.values()),
            "files": {str(path): path.stat().st_size for path in source.files()}, "tensors": tensors}


def inspect_ranks(folder: Path) -> dict[str, Any]:
    """The files of a Megatron checkpoint of an unknown model: layout, arguments, and the tensors of the first rank."""
    found = ranks.load(folder)
    first, chunks = found.first, len(found.first.chunks)
    arguments = first.arguments.state if isinstance(first.arguments, Inert) and isinstance(first.arguments.state, dict) else {}
    tensors: dict[str, Stored] = {}
    for number, chunk in enumerate(first.chunks):
        tensors |= {f"model{number}.{name}" if chunks > 1 else name: stored for name, stored in chunk.items()}
    files = sorted({stored.path for content in found.contents.values() for chunk in content.chunks for stored in chunk.values()})
    entries = {name: _entry(stored.shape, stored.dtype) for name, stored in tensors.items()}
    return {"folder": str(folder), "format": "Megatron, of a model that its files do not name",
            "layout": str(ParallelLayout(tp=found.tp, pp=found.pp, vpp=chunks, ep=found.ep)), "iteration": None, "family": None,
            "spec": {name: arguments.get(name) for name in TOLD}, "parameters": None,
            "bytes": sum(entry["bytes"] for entry in entries.values()),
            "files": {str(path): path.stat().st_size for path in files}, "tensors": entries}


def _entry(shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes": prod(shape) * dtype.itemsize}


def table(facts: dict[str, Any]) -> str:
    """The same as lines for people; tensors that differ in their layer number alone share a line."""
    known = facts["family"] is not None
    lines = [f"{facts['folder']}: {facts['format']}, {facts['layout']}"
             + ("" if facts["iteration"] is None else f", iteration {facts['iteration']}")
             + (f", {facts['lora']}" if facts.get("lora") else "")
             + (f", layers {facts['num_layer_list']}" if facts.get("num_layer_list") else ""),
             (f"family {facts['family']}, {facts['parameters']:,} parameters, {size(facts['bytes'])}" if known else
              f"first rank {size(facts['bytes'])}") + f" in {len(facts['files'])} files", "",
             "model" if known else "arguments in the file"]
    lines += [f"  {name} = {value}" for name, value in facts["spec"].items() if value is not None]
    grouped: dict[tuple[str, str], int] = {}
    for name, entry in facts["tensors"].items():
        general = ".".join("*" if part.isdigit() else part for part in name.split("."))
        key = general, f"{entry['shape']} {entry['dtype']}"
        grouped[key] = grouped.get(key, 0) + 1
    width = max(len(name) for name, _ in grouped)
    lines += ["", f"{len(facts['tensors'])} tensors" + ("" if known else " of the first rank")]
    lines += [f"  {name:{width}}  {count:4} x {about}" for (name, about), count in grouped.items()]
    return "\n".join(lines)
