# SPDX-License-Identifier: Apache-2.0
"""Write `tensors/NAME.txt` for every record: names and shapes of its weights, from another source than this package.

If transformers has the model type, its class is built on the meta device and its state is renamed and split like its own
`save_pretrained` does (version 5 keeps the experts of a layer fused in memory, but not in files). The others come from
`shapes(config)` of the plain references in packages/core/tests/references, written from public descriptions. The head of a tied
embedding is omitted, as in files. Needs transformers; run it from any folder:

    python packages/ckpt-convert/tests/public/make_tensors.py
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from tensor_lists import COMPLETED, REFUSED, Shapes, fold  # noqa: E402

REFERENCES = HERE.parents[2] / "core/tests/references"
SAME_AS = {"Yi": "llama"}  # has its own model type but Llama's tensors
BY_CLASS = {"MiniCPMForCausalLM": "minicpm", "Grok1ModelForCausalLM": "grok"}  # configurations without a model type


def from_transformers(config: dict[str, Any], model_type: str) -> Shapes:
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "torch_dtype")}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[model_type](**values))
    state = revert_weight_conversion(model, model.state_dict())
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def from_reference(config: dict[str, Any], family: str) -> Shapes:
    shapes: Shapes = runpy.run_path(str(REFERENCES / f"{family}.py"))["shapes"](config)
    return shapes


def main() -> None:
    for path in sorted(HERE.glob("*.json")):
        if path.stem in REFUSED:
            continue
        config = json.loads(path.read_text(encoding="utf-8"))["config"] | COMPLETED.get(path.stem, {})
        model_type = config.get("model_type") or BY_CLASS[config["architectures"][0]]
        model_type = SAME_AS.get(model_type, model_type)
        known = model_type in transformers.CONFIG_MAPPING
        shapes = from_transformers(config, model_type) if known else from_reference(config, model_type)
        source = f"transformers {transformers.__version__}" if known else f"the plain reference {model_type}.py"
        target = HERE / "tensors" / f"{path.stem}.txt"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join([f"# from {source}", *fold(shapes)]) + "\n", encoding="utf-8")
        print(f"{path.stem}: {len(shapes)} tensors from {source}")


if __name__ == "__main__":
    main()
