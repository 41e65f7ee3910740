"""The options of `modellink-eval run`. Reading them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modellink.eval.prompts import EvalSettings
from modellink.eval.recorded import recorded_chat
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import RunModelOptions
from modellink.kernels.options import option


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunModelOptions):
    """What is asked of which model."""

    task: tuple[str, ...] = option(doc="Names of benchmarks (see `modellink-eval list`), paths of YAML files, or `all`.")
    task_data_path: tuple[Path, ...] = option(doc="Folders with the data; each task finds its files in them by name and content.")
    output: Path = option(doc="Folder for journals and results; the same command continues a run that was killed.")
    load: Path | None = option(None, "Checkpoint: a Hugging Face folder, Megatron-Core or torch_dist, written at any layout.")
    endpoint: str | None = option(None, "Instead of a checkpoint, the address of an OpenAI-compatible server, e.g. "
                                  "http://localhost:8000/v1; a key is read from OPENAI_API_KEY.")
    endpoint_model: str | None = option(None, "The model to ask the server for; the only one it lists where nothing is said.")
    prompt_style: Literal["original", "lm-eval"] = option("original", "Whose prompts: the original ModelLink's, or those of "
                                                          "lm-evaluation-harness.")
    hf_chat_template: bool = option(False, "Ask in chats, in the template of the model's tokenizer.")
    no_chat_template: bool = option(False, "Ask with plain text, also a checkpoint that was trained with a template.")
    eval_language: Literal["en", "zh"] = option("en", "Language of the words around a question in a chat.")
    evaluation_batch_size: int = option(32, "Questions that are computed together; those whose choices are compared "
                                                 "are noted together too.", minimum=1)
    max_eval_samples: int | None = option(None, "Only the first questions of each subject.", minimum=1)
    max_new_tokens: int | None = option(None, "Longest written answer; the task's where nothing is said.", minimum=1)
    num_samples: int = option(1, "Programs written for each question, for pass@k.", minimum=1)
    temperature: float = option(0.0, "Of written answers; 0 takes the most likely token always.", minimum=0)
    top_p: float = option(1.0, "The share of likely tokens that written answers are drawn from.", minimum=0, maximum=1)
    seed: int = option(0, "Of the draws.", minimum=0)
    allow_code_execution: bool = option(False, "Run programs that the model writes, in a sandbox.")
    isolation: Literal["namespaces", "none"] = option("namespaces", "What such a program is kept in; `none` leaves files and "
                                                      "network open to it.")

    def check(self) -> None:
        """Raise where options contradict each other."""
        if (self.load is None) == (self.endpoint is None):
            raise ModelLinkError("a model is needed, and one only", where="--load, --endpoint",
                                 fix="give a checkpoint or the address of a server")
        named = [name for name, given in (("--prompt-type", self.prompt_type), ("--hf-chat-template", self.hf_chat_template),
                                          ("--no-chat-template", self.no_chat_template)) if given]
        if len(named) > 1:
            raise ModelLinkError(f"{' and '.join(named)} contradict each other", where=named[0], fix="give one of them")
        if self.endpoint is not None and self.prompt_type is not None:
            raise ModelLinkError("a server puts chats into its own template", where="--prompt-type",
                                 fix="start the server with that template and pass --hf-chat-template")
        for flag, value in (("--tp", self.tensor_model_parallel_size > 1), ("--pp", self.pipeline_model_parallel_size > 1),
                            ("--ep", self.expert_model_parallel_size > 1), ("--dtype", self.dtype is not None),
                            ("--tokenizer-name-or-path", self.tokenizer_name_or_path is not None),
                            ("--model-type-hf", self.model_type_hf is not None), ("--device", self.device != "auto")):
            if self.endpoint is not None and value:
                raise ModelLinkError(f"{flag} is for a checkpoint; a server decides it by itself", where=flag, fix="leave it out")
        if self.endpoint is None and self.endpoint_model is not None:
            raise ModelLinkError("--endpoint-model is for a server", where="--endpoint-model", fix="leave it out")

    def settings(self) -> EvalSettings:
        """How the questions are asked: in the template that is named, else in the one the checkpoint was trained with."""
        chat = HF_CHAT_TEMPLATE if self.hf_chat_template else self.prompt_type
        if chat is None and self.load is not None and not self.no_chat_template:
            chat = recorded_chat(self.load)
        return EvalSettings(self.prompt_style, chat, self.eval_language, self.max_new_tokens, self.num_samples, self.temperature,
                      self.top_p, self.seed)
