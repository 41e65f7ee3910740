# SPDX-License-Identifier: Apache-2.0
"""The options of `modellink-convert`, including the original's spellings.

Flags of the original that need no option are in original_flags.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modellink.ckpt_convert.formats import format_names, format_of
from modellink.ckpt_convert.megatron.dialects import Dialect
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import ModelPathOptions, VirtualLayoutOptions
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout


@dataclass(frozen=True)
class ConvertOptions(VirtualLayoutOptions, ModelPathOptions):
    to: str | None = option(None, "Format of the output.", choices=format_names, heading="Output")
    params_dtype: Literal["fp16", "bf16", "fp32"] | None = option(
        None, "Data type of the output. Default: each tensor keeps its data type.")
    make_vocab_size_divisible_by: int = option(1, "Pad the vocabulary to a multiple of this x TP.", minimum=1)
    moe_grouped_gemm: bool = option(False, "Store all experts of a rank in two tensors, as training with this option does.")
    dialect: Literal["megatron-core", "modellink-1.0"] | None = option(
        None, "Weight names of the output: megatron-core's, or the original's (they differ for latent attention and the gate of "
        "shared experts). Default: megatron-core; with --save-model-type modellink-1.0.")
    max_shard_size: float = option(5.0, "Largest safetensors or distcp file.", unit="GB", minimum=0.000001)
    overwrite: bool = option(False, "Replace the output if it exists.")
    verify: bool = option(False, "Read the output back and compare every tensor bit by bit.")
    verify_model: bool = option(True, "With --verify, also load the output in transformers if it is installed: compare names and "
                                      "shapes, and the logits of a few tokens if there is enough memory.")
    workers: int | None = option(None, "Number of threads that read and write. Default: one per CPU core, at most 4.", minimum=1)
    iteration: int | None = option(None, "Iteration to read. Default: the last complete one.", minimum=0, alias="--ckpt-step",
                                   heading="Source")
    true_vocab_size: int | None = option(None, "Vocabulary size of the model without padding; only checked.", minimum=1)
    allow_diverged: Literal["first"] | None = option(None, "If the ranks hold different copies of a weight, use the first one. "
                                                           "Default: refuse.")
    lora_load: Path | None = option(None, "Merge this LoRA adapter into the weights: a peft folder, or a Megatron checkpoint in "
                                          "any layout.", heading="LoRA adapter")
    lora_r: int | None = option(None, "Rank of the adapter. Required if it is not recorded, otherwise checked.", minimum=1)
    lora_alpha: float | None = option(None, "The adapter is scaled by alpha / r. Required if it is not recorded, otherwise "
                                            "checked.")
    lora_target_modules: tuple[str, ...] = option((), "Modules that the adapter must have, e.g. linear_qkv linear_proj; only "
                                                      "checked.", alias="--lora-targets")
    inspect: bool = option(False, "Describe SRC, and stop; same as `modellink-convert inspect SRC`.", listed=False)
    json: bool = option(False, "With --inspect: print JSON.", listed=False)
    load_dir: Path | None = option(None, "The original's spelling of SRC.", listed=False)
    save_dir: Path | None = option(None, "The original's spelling of DST. If it is a Hugging Face folder, its configuration and "
                                         "tokenizer are used, and the output is its subfolder mg2hf.", listed=False)
    load_model_type: Literal["hf", "mg"] | None = option(None, "Whether SRC is Hugging Face or Megatron; only checked.",
                                                         listed=False)
    save_model_type: str | None = option(
        None, "The original's spelling of --to: mg (or megatron) is Megatron-Legacy, with --use-mcore-models Megatron-Core in "
        "the original's dialect; hf (or save_huggingface_llama and similar) is Hugging Face.", listed=False)
    use_mcore_models: bool = option(False, "With --save-model-type mg: write Megatron-Core, not Megatron-Legacy.", listed=False)
    save_to_legacy: bool = option(False, "With --save-model-type mg: write Megatron-Legacy even with --use-mcore-models.",
                                  listed=False)

    def target(self) -> str:
        """Return the name of the output format.

        Raises:
            ModelLinkError: it is missing, unknown, or given twice.
        """
        if (self.to is None) == (self.save_model_type is None):
            raise ModelLinkError("the format of the output must be given once", where="--to, --save-model-type", option="to",
                                 fix="--to hf or --to megatron-core")
        if self.to is not None:
            return format_of(self.to).name
        kind = str(self.save_model_type)
        if kind == "hf" or kind.startswith("save_huggingface_"):
            return "hf"
        if kind not in ("mg", "megatron"):
            raise ModelLinkError(f"--save-model-type is {kind!r}, it must be mg or hf", where="--save-model-type")
        return "megatron-core" if self.use_mcore_models and not self.save_to_legacy else "megatron-legacy"

    def names(self) -> Dialect:
        """Return the dialect; command lines of the original get the original's."""
        if self.dialect is not None:
            return self.dialect
        return "modellink-1.0" if self.save_model_type is not None else "megatron-core"

    @property
    def targets(self) -> list[str]:
        """The modules of --lora-target-modules, separated by blanks or commas."""
        return [name for words in self.lora_target_modules for name in words.replace(",", " ").split()]

    def output_layout(self, num_layers: int) -> ParallelLayout:
        """Return the layout of the output; a checkpoint has no data parallel size.

        Raises:
            ModelLinkError: the layers cannot be split evenly into chunks of that size.
        """
        return replace(self.layout(num_layers), dp=1)
