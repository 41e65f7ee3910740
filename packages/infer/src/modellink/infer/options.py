# SPDX-License-Identifier: Apache-2.0
"""The options of the commands. Importing this module imports no torch, so that help texts and mistakes appear
at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.infer.arguments import GenerationArguments, check_arguments
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import note
from modellink.kernels.model_options import RunModelOptions
from modellink.kernels.options import option


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunModelOptions):
    """Which model to load, and where to run it."""

    heading: ClassVar[str] = "Model"

    load: Path = option(
        doc="Checkpoint to load: a Hugging Face folder, Megatron-Core, Megatron-Legacy or torch-dist, "
        "written at any layout.")
    ckpt_step: int | None = option(
        None, "Iteration of --load to read. Default: the last complete one.", alias="--iteration", minimum=0)
    hf_chat_template: bool | None = option(
        None, "Use the tokenizer's own chat template, whichever the checkpoint was trained with. chat also "
        "accepts --no-hf-chat-template, which joins the messages without a template, for a base model.")
    cache_tokens: int | None = option(
        None, "Capacity of the cache over all sequences. Default: --batch-size sequences of the maximum "
        "length, or what fits into half of the free memory.", unit="tokens", minimum=1,
        heading="Cache and speed")
    native: bool | None = option(
        None, "On a CPU, run passes over few tokens with a compiled function. Needs a C compiler and a "
        "model with RMSNorm, rotary positions and a gated feed-forward on one rank. Default: on if it is "
        "measured to be faster when the model is loaded.")
    int8: bool = option(
        False, "With the compiled function, store the weights in int8 with a scale per row, and print the "
        "quantization error.")
    graphs: bool | None = option(
        None, "Run decode passes from captured graphs. Default: on for CUDA and NPUs, for models on one "
        "rank without experts.")

    def check(self) -> None:
        if self.prompt_type and self.hf_chat_template is not None:
            raise ModelLinkError("the options contradict each other",
                                 where="--prompt-type, --hf-chat-template", fix="remove one of them")
        if self.int8 and self.native is False:
            raise ModelLinkError("int8 weights need the compiled function", where="--int8, --no-native",
                                 fix="remove one of them")

    @property
    def template(self) -> str | None:
        """The prompt type that the options name, None for the checkpoint's."""
        return HF_CHAT_TEMPLATE if self.hf_chat_template else self.prompt_type


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate."""

    heading: ClassVar[str] = "Completions"

    max_new_tokens: int | None = option(
        None, "Maximum length of a completion. Default: 128, or less if the model's maximum length is "
        "reached.", unit="tokens", minimum=1)
    max_length: int | None = option(
        None, "Maximum length of prompt and completion together, instead of --max-new-tokens.", unit="tokens",
        minimum=1)
    stop: tuple[str, ...] = option(
        (), "Strings that end a completion and are not part of it.", alias="--add-eos-token")
    json_schema: str | None = option(
        None, "JSON schema that the completion must match: a file, or the JSON text.")
    regex: str | None = option(None, "Regular expression that the completion must match.")
    do_sample: bool | None = option(
        None, "Sample tokens instead of taking the most likely one. Default: on in chat, and if "
        "--temperature, --top-k, --top-p or --min-p is given.", heading="Sampling")
    temperature: float = option(
        0.7, "Divides the logits; 0 takes the most likely token.", minimum=0)
    top_k: int = option(
        50, "Keep only this many of the most likely tokens; 0 keeps all.", minimum=0)
    top_p: float = option(
        0.95, "Keep only the most likely tokens that together have this probability.", minimum=0,
        maximum=1)
    min_p: float = option(
        0.0, "Keep only tokens with at least this fraction of the most likely one's probability.",
        minimum=0, maximum=1)
    repetition_penalty: float = option(
        1.0, "Divides the positive logits, and multiplies the negative ones, of tokens in the prompt and "
        "the completion.")
    presence_penalty: float = option(0.0, "Subtracted from the logits of tokens in the completion.")
    frequency_penalty: float = option(
        0.0, "Subtracted from the logits of tokens in the completion, times their count.")
    seed: int | None = option(None, "Random seed of sampling. Default: a different one each time.", minimum=0)
    num_return_sequences: int = option(
        1, "Completions per prompt: the best beams, or several samples.", minimum=1)
    num_beams: int = option(1, "Number of beams.", minimum=1, heading="Beam search")
    length_penalty: float = option(1.0, "Scores are divided by tokens ^ length penalty.")

    def arguments(self, given: set[str], *, sample: bool) -> GenerationArguments:
        """Return the checked arguments of `Engine.generate`.

        Args:
            given: names of the options on the command line.
            sample: whether to sample if no option decides it.

        Raises:
            ModelLinkError: options contradict each other, or one would have no effect.
        """
        filters = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in given]
        sample = self.do_sample if self.do_sample is not None else sample or bool(filters)
        unused = [*filters, *(["seed"] if "seed" in given else [])]
        if unused and not sample:
            name = "--" + unused[0].replace("_", "-")
            raise ModelLinkError(f"{name} has no effect without sampling", where=name,
                                 fix=f"add --do-sample, or remove {name}")
        if self.num_return_sequences > 1 and not sample and self.num_beams == 1:
            raise ModelLinkError("several completions need sampling or beam search",
                                 where="--num-return-sequences", fix="add --do-sample or --num-beams")
        arguments = GenerationArguments(
            do_sample=sample, max_new_tokens=self.max_new_tokens, max_length=self.max_length, seed=self.seed,
            stop=self.stop, repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            num_beams=self.num_beams, length_penalty=self.length_penalty,
            num_return_sequences=self.num_return_sequences, regex=self.regex, json_schema=self._schema())
        if sample:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p,
                          "min_p": self.min_p}
        check_arguments(arguments)
        return arguments

    def _schema(self) -> str | None:
        if self.json_schema is None or self.json_schema.lstrip().startswith("{"):
            return self.json_schema
        try:
            return Path(self.json_schema).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLinkError(f"the schema cannot be read: {error}", where="--json-schema") from None


@dataclass(frozen=True)
class PromptOptions:
    """Prompts and output."""

    heading: ClassVar[str] = "Prompts and output"

    prompt: tuple[str, ...] = option((), "One or more prompts.")
    prompt_file: Path | None = option(
        None, 'File with one prompt (a final newline is removed), or a .jsonl file with one prompt per '
        'line: a string, or an object with "prompt" or "messages".')
    chat: bool = option(
        False, "Treat prompts as user messages and apply the chat template. Implied by --prompt-type and "
        "--hf-chat-template.")
    system: str | None = option(None, "System message (with --chat).")
    stream: bool = option(False, "Print the completion as it is generated.")
    json: bool = option(
        False, "Print one JSON object per completion: prompt, text, token_ids, finish_reason.")
    logprobs: bool = option(False, "Add the log-probability of each token to the JSON object (with --json).")
    batch_size: int = option(16, "Maximum number of prompts computed together.", minimum=1)

    def check(self) -> None:
        if self.prompt and self.prompt_file:
            raise ModelLinkError("prompts come from the command line or from a file, not both",
                                 where="--prompt, --prompt-file", fix="remove one of them")
        if self.logprobs and not self.json:
            raise ModelLinkError("log-probabilities are printed as JSON only", where="--logprobs",
                                 fix="add --json")
        if self.stream and self.json:
            raise ModelLinkError("output is streamed as text or printed as JSON, not both",
                                 where="--stream, --json", fix="remove one of them")


@dataclass(frozen=True)
class ChatOptions:
    """Conversation."""

    heading: ClassVar[str] = "Conversation"

    system: str | None = option(None, "System message.")
    history_turns: int = option(
        3, "Number of earlier turns (a question and its answer) in the prompt.", unit="turns", minimum=0)


@dataclass(frozen=True)
class ServeOptions:
    """Server."""

    heading: ClassVar[str] = "Server"

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 accepts connections from other machines.")
    port: int = option(8000, "Port to listen on.", minimum=1, maximum=65535)
    served_model_name: str | None = option(
        None, "Name of the model in the API. Default: the name of the checkpoint's folder.")
    api_key: str | None = option(
        None, "Key that requests must send as Authorization: Bearer KEY. Default: the environment variable "
        "MODELLINK_API_KEY.")
    replicas: int = option(
        1, "Number of replicas of the model behind this address. Each is a process (with --tp a group of "
        "processes) and uses its share of the accelerators.", minimum=1)
    replica_url: tuple[str, ...] = option(
        (), "Addresses of running servers, as http://HOST:PORT. This server then only forwards requests to "
        "them, and takes no --load.")
    batch_size: int = option(16, "Maximum number of completions computed together, per replica.", minimum=1)
    max_waiting: int = option(
        256, "Maximum number of completions running or waiting; further requests get status 429.", minimum=1)
    max_body: int = option(2 << 20, "Maximum size of a request body.", unit="bytes", minimum=1)

    def check(self) -> None:
        for url in self.replica_url:
            if not re.fullmatch(r"https?://[^/\s]+/?", url):
                raise ModelLinkError(f"{url!r} is not the address of a server", where="--replica-url",
                                     fix="write it as http://HOST:PORT")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.key and not self.replica_url:
            note(f"listening on {self.host} without an API key: everybody who can reach it can use the model")

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("MODELLINK_API_KEY") or None
