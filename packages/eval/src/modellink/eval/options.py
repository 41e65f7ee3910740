# SPDX-License-Identifier: Apache-2.0
"""The options of `modellink-eval run`; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from modellink.eval.prompts import EvalSettings
from modellink.eval.recorded import recorded_chat
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import RunModelOptions
from modellink.kernels.options import option


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunModelOptions):
    """Options of `modellink-eval run`."""

    heading: ClassVar[str] = "Benchmarks"

    task: tuple[str, ...] = option(doc="Names of benchmarks (see `modellink-eval list`), paths of YAML files, or `all`.")
    task_data_path: tuple[Path, ...] = option(doc="Folders with the data; each task finds its files by name and content.")
    output: Path = option(doc="Folder for journals and results; the same command resumes a run that was killed.")
    max_eval_samples: int | None = option(None, "Use only the first questions of each subject.", alias="--max-samples", minimum=1)
    load: Path | None = option(None, "Checkpoint: a Hugging Face folder, Megatron-Core or torch-dist, of any layout.",
                                heading="Model")
    endpoint: str | None = option(None, "Address of an OpenAI-compatible server to evaluate instead of a checkpoint, e.g. "
                                  "http://localhost:8000/v1. The key is read from OPENAI_API_KEY.")
    endpoint_model: str | None = option(None, "Model name on the server. Default: the only model it lists.")
    prompt_style: Literal["original", "lm-eval"] = option("original", "Prompts of the original ModelLink, or those of "
                                                          "lm-evaluation-harness.", heading="Prompts")
    hf_chat_template: bool = option(False, "Use chat prompts in the template of the model's tokenizer.")
    no_chat_template: bool = option(False, "Use plain-text prompts, even if the checkpoint was trained with a chat template.")
    eval_language: Literal["en", "zh"] = option("en", "Language of the text around a question in a chat.")
    evaluation_batch_size: int = option(32, "Questions per batch. Answers of multiple-choice questions are also recorded per "
                                        "batch.", alias="--batch-size", minimum=1, heading="Answers")
    max_new_tokens: int | None = option(None, "Maximum tokens of a generated answer. Default: that of the task.", minimum=1)
    num_samples: int = option(1, "Programs generated per question, for pass@k.", minimum=1)
    temperature: float = option(0.0, "Sampling temperature of generated answers; 0: greedy decoding.", minimum=0)
    top_p: float = option(1.0, "Sample from the most likely tokens with this total probability.", minimum=0, maximum=1)
    seed: int = option(0, "Seed of sampling.", minimum=0)
    allow_code_execution: bool = option(False, "Run generated programs, in a sandbox.", heading="Generated programs")
    isolation: Literal["namespaces", "none"] = option("namespaces", "Isolation of generated programs; with `none` they can "
                                                      "access files and the network.")

    def check(self) -> None:
        """Raise ModelLinkError if options contradict each other."""
        if (self.load is None) == (self.endpoint is None):
            raise ModelLinkError("exactly one model is required", where="--load, --endpoint",
                                 fix="give either a checkpoint or the address of a server")
        named = [name for name, given in (("--prompt-type", self.prompt_type), ("--hf-chat-template", self.hf_chat_template),
                                          ("--no-chat-template", self.no_chat_template)) if given]
        if len(named) > 1:
            raise ModelLinkError(f"{' and '.join(named)} contradict each other", where=named[0], fix="give one of them")
        if self.endpoint is not None and self.prompt_type is not None:
            raise ModelLinkError("a server applies its own chat template", where="--prompt-type",
                                 fix="start the server with that template and pass --hf-chat-template")
        for flag, value in (("--tp", self.tensor_model_parallel_size > 1), ("--pp", self.pipeline_model_parallel_size > 1),
                            ("--ep", self.expert_model_parallel_size > 1), ("--dtype", self.dtype is not None),
                            ("--tokenizer-name-or-path", self.tokenizer_name_or_path is not None),
                            ("--model-type-hf", self.model_type_hf is not None), ("--device", self.device != "auto")):
            if self.endpoint is not None and value:
                raise ModelLinkError(f"{flag} applies to checkpoints only, not to a server", where=flag, fix="remove it")
        if self.endpoint is None and self.endpoint_model is not None:
            raise ModelLinkError("--endpoint-model needs --endpoint", where="--endpoint-model", fix="remove it")

    def settings(self) -> EvalSettings:
        """Return the prompt settings; without a named template, the one the checkpoint was trained with is used."""
        chat = HF_CHAT_TEMPLATE if self.hf_chat_template else self.prompt_type
        if chat is None and self.load is not None and not self.no_chat_template:
            chat = recorded_chat(self.load)
        return EvalSettings(self.prompt_style, chat, self.eval_language, self.max_new_tokens, self.num_samples, self.temperature,
                      self.top_p, self.seed)
