# SPDX-License-Identifier: Apache-2.0
"""What was trained on the device, through the formats and back, and decoded from both ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checks.decode import compare, decode
from checks.training import run
from registry import Machine, require, row


def round_trip(saved: str, folder: str) -> dict[str, Any]:
    """On a rank: convert a saved run to Hugging Face, to Megatron-Core for six ranks, and back; compare."""
    import torch
    from safetensors.torch import load_file

    from modellink.ckpt_convert import convert
    from modellink.kernels.parallel import ParallelLayout

    there, middle, back = (Path(folder) / name for name in ("there", "middle", "back"))
    convert(saved, there, to="hf")
    convert(there, middle, to="megatron-core", layout=ParallelLayout(tp=2, pp=3))
    convert(middle, back, to="hf")
    first, second = ({name: tensor for path in sorted(place.glob("*.safetensors"))
                      for name, tensor in load_file(path).items()} for place in (there, back))
    differ = [name for name in first.keys() | second.keys()
              if name not in first or name not in second or not torch.equal(first[name], second[name])]
    return {"tensors": len(first), "differ": sorted(differ), "hf": str(back)}


@row("conversion: what was trained returns from other formats, and decodes to the same tokens")
def conversion(machine: Machine) -> str:
    saved = machine.folder / "trained"
    run(machine, {"train_iters": 2, "save": str(saved)})
    found = machine.on_device(round_trip, saved=str(saved), folder=str(machine.folder))
    differ = found["differ"]
    require(not differ, f"{len(differ)} of {found['tensors']} tensors differ: {differ[:3]}")
    options = {"device": machine.kind, "dtype": "float32", "graphs": False}
    before, after = (machine.on_device(decode, path=str(path), **options) for path in (saved, found["hf"]))
    return f"{found['tensors']} tensors bit-equal; {compare(after, before)}"
