"""The options of `modellink-eval run`. Reading them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modellink.kernels.options import option


@dataclass(frozen=True)
class RunOptions:
    """What is asked of which model."""

    task: tuple[str, ...] = option(doc="Names of benchmarks (see `modellink-eval list`), or paths of YAML files.")
    task_data_path: tuple[Path, ...] = option(doc="Folders with the data; each task finds its files in them by name and content.")
    load: Path = option(doc="Checkpoint: a Hugging Face folder, Megatron-Core or torch_dist, written at any layout.")
    output: Path = option(doc="Folder for journals and results.json; the same command continues a run that was killed.")
    prompt_style: Literal["original", "lm-eval"] = option("original", "Whose prompts: the original ModelLink's, or those of "
                                                          "lm-evaluation-harness.")
    evaluation_batch_size: int = option(8, "Questions that are computed and noted together.", minimum=1)
    max_eval_samples: int | None = option(None, "Only the first questions of each subject.", minimum=1)
    tensor_model_parallel_size: int = option(1, "Processes each weight matrix is cut over.", alias="--tp", minimum=1)
    device: Literal["auto", "cpu", "cuda", "npu"] = option("auto", "What to run on.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "Precision of weights and activations; the "
                                                                     "checkpoint's where nothing is said.")
    tokenizer_name_or_path: Path | None = option(None, "Hugging Face folder with config.json and tokenizer, for a checkpoint "
                                                 "that does not carry its own.")
    model_type_hf: str | None = option(None, "Family of the model, where the checkpoint does not say it.")
