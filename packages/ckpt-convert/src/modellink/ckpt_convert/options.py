"""Every option of `modellink-convert`, the original's spellings included, and what they ask for together.

Flags of the original that need no option are in original_flags.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modellink.ckpt_convert.formats.dialects import Dialect
from modellink.ckpt_convert.plan import Target
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import ModelPathOptions, VirtualLayoutOptions
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout


@dataclass(frozen=True)
class ConvertOptions(VirtualLayoutOptions, ModelPathOptions):
    to: Literal["hf", "megatron-core", "megatron-legacy", "torch_dist", "peft"] | None = option(None, "Format of the output.")
    params_dtype: Literal["fp16", "bf16", "fp32"] | None = option(
        None, "Number format of the output; each tensor keeps its own where nothing is said.")
    make_vocab_size_divisible_by: int = option(1, "The vocabulary is padded to a multiple of this x TP.", minimum=1)
    moe_grouped_gemm: bool = option(False, "The experts of a rank are two tensors, as in training with it.")
    dialect: Literal["megatron-core", "modellink-1.0"] | None = option(
        None, "Names of the output: those of megatron-core, or the original's where they differ (latent attention, gate of "
        "shared experts). megatron-core where nothing is said, with --save-model-type modellink-1.0.")
    true_vocab_size: int | None = option(None, "Vocabulary of the model without padding; it is checked.", minimum=1)
    lora_load: Path | None = option(None, "Merge the LoRA adapter of this folder into the weights: one of peft, or a Megatron "
                                          "checkpoint in any layout.")
    lora_r: int | None = option(None, "Rank of the adapter; needed where nothing else says it, else checked.", minimum=1)
    lora_alpha: float | None = option(None, "The adapter is scaled by alpha / r; needed where its checkpoint does not say it.")
    lora_targets: str | None = option(None, "Modules the adapter has, e.g. linear_qkv,linear_proj, as the original's "
                                            "--lora-target-modules says them; they are checked.")
    iteration: int | None = option(None, "Iteration to read; the last complete one where nothing is said.", minimum=0)
    max_shard_size: float = option(5.0, "Largest safetensors or distcp file.", unit="GB", minimum=0.000001)
    workers: int | None = option(None, "Threads that read and write; one a processor, at most 4, where nothing is said.",
                                 minimum=1)
    overwrite: bool = option(False, "Replace the output when it exists.")
    verify: bool = option(False, "Read the output back and compare every tensor bit by bit.")
    verify_model: bool = option(True, "With --verify, transformers builds the model too, where it is installed: names, shapes, "
                                      "and logits of a few tokens if there is memory for it.")
    dry_run: bool = option(False, "Say what would be written, and stop.")
    inspect: bool = option(False, "Describe SRC, and stop; as `modellink-convert inspect SRC`.")
    json: bool = option(False, "With --inspect: as JSON.")
    load_dir: Path | None = option(None, "The original's spelling of SRC.")
    save_dir: Path | None = option(None, "The original's spelling of DST. Where it is a Hugging Face folder already, that gives "
                                         "configuration and tokenizer and the output is its subfolder mg2hf.")
    load_model_type: Literal["hf", "mg"] | None = option(None, "What SRC is, Hugging Face or Megatron; it is checked.")
    save_model_type: str | None = option(
        None, "The original's spelling of --to: mg (also megatron) is Megatron-Legacy, or with --use-mcore-models Megatron-Core "
        "in the original's dialect; hf (also save_huggingface_llama and its like) is Hugging Face.")
    use_mcore_models: bool = option(False, "With --save-model-type mg: Megatron-Core and not Megatron-Legacy.")
    save_to_legacy: bool = option(False, "With --save-model-type mg: Megatron-Legacy, though --use-mcore-models is given.")

    def target(self) -> Target:
        """The format of the output.

        Raises:
            ModelLinkError: it is not said, or twice.
        """
        if (self.to is None) == (self.save_model_type is None):
            raise ModelLinkError("the format of the output must be given once", where="--to, --save-model-type",
                                 fix="--to hf or --to megatron-core")
        if self.to is not None:
            return self.to
        kind = str(self.save_model_type)
        if kind == "hf" or kind.startswith("save_huggingface_"):
            return "hf"
        if kind not in ("mg", "megatron"):
            raise ModelLinkError(f"{kind} is no format", where="--save-model-type", fix="mg or hf")
        return "megatron-core" if self.use_mcore_models and not self.save_to_legacy else "megatron-legacy"

    def names(self) -> Dialect:
        """The dialect: the original's where a script of the original asks for its Megatron."""
        return self.dialect or ("modellink-1.0" if self.save_model_type is not None else "megatron-core")

    def output_layout(self, num_layers: int) -> ParallelLayout:
        """Return the layout of the output; a checkpoint has no data parallel size.

        Raises:
            ModelLinkError: the layers cannot be split evenly into chunks of that size.
        """
        return replace(self.layout(num_layers), dp=1)
