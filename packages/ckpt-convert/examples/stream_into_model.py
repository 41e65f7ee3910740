# SPDX-License-Identifier: Apache-2.0
"""Fill a running model from a Megatron checkpoint, tensor by tensor, without a file in between.

    python stream_into_model.py CHECKPOINT [HF_FOLDER]

CHECKPOINT is anything that `modellink-convert` reads. The model is its class in transformers, built on the meta device;
each tensor is assigned as it arrives, so that the model is in memory only once. HF_FOLDER has the config.json of a
checkpoint without one. Needs transformers.
"""

from __future__ import annotations

import sys

import torch
import transformers

from modellink.ckpt_convert import iter_hf_tensors, open_checkpoint


def main(path: str, hf: str | None = None) -> transformers.PreTrainedModel:
    source = open_checkpoint(path, hf=hf)
    config = transformers.AutoConfig.from_pretrained(source.companions)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=source.main_dtype)
    for name, tensor in iter_hf_tensors(source):
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are computed, not stored
    model.model.rotary_emb = rotary
    return model.eval()


if __name__ == "__main__":
    model = main(*sys.argv[1:])
    ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; next token "
              f"{int(model(ids).logits[0, -1].argmax())}")
