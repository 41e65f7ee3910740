"""Fill a running model from a Megatron checkpoint, tensor by tensor, with no file in between.

    python stream_into_model.py CHECKPOINT [HF_FOLDER]

CHECKPOINT is anything `modellink-convert` reads. The model is the class transformers has for it, made on the meta device; each
tensor takes its place as it arrives, so that the model is in memory once. HF_FOLDER has config.json where the checkpoint
carries none. Needs transformers.
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
