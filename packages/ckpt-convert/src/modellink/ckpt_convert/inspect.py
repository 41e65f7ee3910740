"""What a checkpoint is, without converting it: model, layout, tensors, sizes; for people and as JSON."""

from __future__ import annotations

from math import prod
from typing import Any

from modellink.ckpt_convert.plan import size
from modellink.ckpt_convert.source import Checkpoint


def inspect(source: Checkpoint) -> dict[str, Any]:
    """Everything about a checkpoint but its numbers, ready for JSON; sizes in bytes, tensors under canonical names."""
    tensors = {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
                      "bytes": prod(tensor.shape) * tensor.dtype.itemsize} for name, tensor in source.tensors.items()}
    return {"folder": str(source.folder), "format": source.format, "layout": str(source.layout),
            "iteration": source.iteration, "family": source.family, "spec": source.spec.to_dict(),
            "parameters": sum(prod(tensor.shape) for tensor in source.tensors.values()),
            "bytes": sum(entry["bytes"] for entry in tensors.values()),
            "files": {str(path): path.stat().st_size for path in source.files()}, "tensors": tensors}


def table(facts: dict[str, Any]) -> str:
    """The same as lines for people; tensors that differ in their layer number alone share a line."""
    lines = [f"{facts['folder']}: {facts['format']}, {facts['layout']}"
             + ("" if facts["iteration"] is None else f", iteration {facts['iteration']}"),
             f"family {facts['family']}, {facts['parameters']:,} parameters, {size(facts['bytes'])} "
             f"in {len(facts['files'])} files", "", "model"]
    lines += [f"  {name} = {value}" for name, value in facts["spec"].items() if value is not None]
    grouped: dict[tuple[str, str], int] = {}
    for name, entry in facts["tensors"].items():
        general = ".".join("*" if part.isdigit() else part for part in name.split("."))
        key = general, f"{entry['shape']} {entry['dtype']}"
        grouped[key] = grouped.get(key, 0) + 1
    width = max(len(name) for name, _ in grouped)
    lines += ["", f"{len(facts['tensors'])} tensors"]
    lines += [f"  {name:{width}}  {count:4} x {about}" for (name, about), count in grouped.items()]
    return "\n".join(lines)
