"""The options of the commands. Reading them imports no torch, so that help and mistakes come at once."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import RunModelOptions
from modellink.kernels.options import option

if TYPE_CHECKING:
    from modellink.infer.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunModelOptions):
    """Which model, and where it runs."""

    load: Path = option(doc="Checkpoint: a Hugging Face folder, Megatron-Core, Megatron-Legacy or torch_dist, written at any "
                        "layout.")
    cache_tokens: int | None = option(None, "Tokens the cache holds, over all prompts and answers that run together; where "
                                      "nothing is said as many as can be used and half of the free memory has room for.",
                                      unit="tokens", minimum=1)
    native: bool | None = option(None, "On a CPU, compute passes of few tokens by a compiled function, where it takes the model "
                                 "(RMSNorm, rotary positions, gated feed-forward; one rank) and there is a C compiler; where "
                                 "nothing is said, if it is faster, which is measured when the model is loaded.")
    int8: bool = option(False, "With that function, hold the weights in int8, with a scale for each row; the error is printed.")
    graphs: bool | None = option(None, "Compute passes of single tokens from captured graphs; where nothing is said on CUDA and "
                                 "NPUs, for models on one rank without experts.")
    hf_chat_template: bool | None = option(None, "The tokenizer's own template, whatever the checkpoint was trained with; chat "
                                           "takes --no-hf-chat-template, which joins texts as they are, for a model that knows "
                                           "no chat.")

    def check(self) -> None:
        if self.prompt_type and self.hf_chat_template is not None:
            raise ModelLinkError("they contradict each other", where="--prompt-type, --hf-chat-template", fix="give one of them")
        if self.int8 and self.native is False:
            raise ModelLinkError("int8 weights are read by the compiled function", where="--int8, --no-native",
                                 fix="give one of them")

    def plan(self, index: int) -> Plan:
        """Open and check the checkpoint; imports torch."""
        from modellink.infer.plan import make_plan
        return make_plan(self.load, layout=self.layout(), device=self.device, index=index, dtype=self.dtype,
                         family=self.model_type_hf, tokenizer=self.tokenizer_name_or_path,
                         prompt_type=HF_CHAT_TEMPLATE if self.hf_chat_template else self.prompt_type)


@dataclass(frozen=True)
class AnswerOptions:
    """How the model answers."""

    max_new_tokens: int | None = option(None, "Longest answer; where nothing is said 128, or what the model has room for.",
                                        unit="tokens", minimum=1)
    max_length: int | None = option(None, "Longest prompt and answer together, in the place of --max-new-tokens.", unit="tokens",
                                    minimum=1)
    do_sample: bool | None = option(None, "Draw tokens instead of taking the most likely one; on by itself in chat, and "
                                    "when --temperature, --top-k or --top-p is given.")
    temperature: float = option(0.7, "Drawing: the logits are divided by it; 0 takes the most likely token.", minimum=0)
    top_k: int = option(50, "Drawing: only among that many most likely tokens; 0 for all.", minimum=0)
    top_p: float = option(0.95, "Drawing: only among the most likely tokens that have this probability together.", minimum=0,
                          maximum=1)
    min_p: float = option(0.0, "Drawing: only tokens that have this share of the most likely one's probability.", minimum=0,
                          maximum=1)
    repetition_penalty: float = option(1.0, "Logits of tokens in prompt and answer are divided by it (multiplied, below 0).")
    presence_penalty: float = option(0.0, "Taken from the logit of tokens that the answer holds already.")
    frequency_penalty: float = option(0.0, "The same, times how often it holds them.")
    seed: int | None = option(None, "Drawing: the same seed draws the same tokens; another one each time where nothing is said.",
                              minimum=0)
    stop: tuple[str, ...] = option((), "Texts that end an answer and are not part of it.", alias="--add-eos-token")
    json_schema: str | None = option(None, "JSON schema that the answer keeps to: a file, or the JSON itself.")
    regex: str | None = option(None, "Regular expression that the whole answer keeps to.")
    num_beams: int = option(1, "Texts that grow side by side; the best as a whole is the answer.", minimum=1)
    length_penalty: float = option(1.0, "Beams: scores are divided by tokens ^ this.")
    num_return_sequences: int = option(1, "Answers to each prompt: the best beams, or so many draws.", minimum=1)

    def arguments(self, given: set[str], *, draws: bool) -> dict[str, Any]:
        """For `Engine.generate`. `given` are the names that stood on the command line; `draws` what is done when nothing is said.

        Raises:
            ModelLinkError: an option that would do nothing.
        """
        drawing = sorted({"temperature", "top_k", "top_p", "min_p", "seed"} & given)
        sample = self.do_sample if self.do_sample is not None else draws or bool(set(drawing) - {"seed"})
        if drawing and not sample:
            raise ModelLinkError(f"--{drawing[0].replace('_', '-')} is for drawing tokens, but the most likely one is taken",
                                 where="command line", fix="add --do-sample, or leave it out")
        if self.num_return_sequences > 1 and not sample and self.num_beams == 1:
            raise ModelLinkError(f"the most likely token gives one answer, not {self.num_return_sequences}",
                                 where="--num-return-sequences", fix="add --do-sample, or beams with --num-beams")
        values = {name: getattr(self, name) for name in (
            "max_new_tokens", "max_length", "seed", "stop", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "num_beams", "length_penalty", "num_return_sequences")}
        drawn = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")} if sample else {}
        return {**values, **drawn, "do_sample": sample, "regex": self.regex, "json_schema": self._schema()}

    def _schema(self) -> str | None:
        if self.json_schema is None or self.json_schema.lstrip().startswith("{"):
            return self.json_schema
        try:
            return Path(self.json_schema).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLinkError(f"the schema cannot be read: {error}", where="--json-schema") from None


@dataclass(frozen=True)
class PromptOptions:
    """What is asked, and how the answer is shown."""

    prompt: tuple[str, ...] = option((), "One or several prompts.")
    prompt_file: Path | None = option(None, "A file that is one prompt (without its last line end); with the ending .jsonl one "
                                      'prompt a line, a text or an object with "prompt" or "messages".')
    chat: bool = option(False, "A prompt is what a user says, and a template is put around it; so with --prompt-type and "
                        "--hf-chat-template too.")
    system: str | None = option(None, "System message before it (with --chat).")
    stream: bool = option(False, "Show the answer as it is made.")
    json: bool = option(False, "Print a JSON object a line: prompt, text, token_ids, finish_reason.")
    logprobs: bool = option(False, "In it the log-probability of each token too (with --json).")
    batch_size: int = option(16, "How many prompts are computed together at most.", minimum=1)

    def check(self) -> None:
        if self.prompt and self.prompt_file:
            raise ModelLinkError("prompts come from the command line or from a file, not from both",
                                 where="--prompt, --prompt-file")
        if self.logprobs and not self.json:
            raise ModelLinkError("log-probabilities are printed as JSON", where="--logprobs", fix="add --json")
        if self.stream and self.json:
            raise ModelLinkError("an answer is streamed as text or printed as JSON, not both", where="--stream, --json")


@dataclass(frozen=True)
class ChatOptions:
    """The conversation."""

    system: str | None = option(None, "System message at its beginning.")
    history_turns: int = option(3, "How many earlier questions and answers the model sees again.", unit="turns", minimum=0)


@dataclass(frozen=True)
class ServeOptions:
    """The server."""

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(8000, "Port to listen at.", minimum=1, maximum=65535)
    served_model_name: str | None = option(None, "What the model is called in requests; the name of its folder where nothing is "
                                           "said.")
    api_key: str | None = option(None, "Requests must carry it as Authorization: Bearer KEY; MODELLINK_API_KEY in the "
                                 "environment says the same.")
    replicas: int = option(1, "Processes (with --tp groups of them) that have the model each, behind this one address; each has "
                           "its share of the accelerators.", minimum=1)
    replica_url: tuple[str, ...] = option((), "Servers of the model that run already, on this machine or others, as "
                                          "http://HOST:PORT; this one stands in front of them and takes no --load.")
    batch_size: int = option(16, "Answers computed together at most, of each replica.", minimum=1)
    max_waiting: int = option(256, "Answers under way or waiting at most; a request beyond them gets status 429.", minimum=1)
    max_body: int = option(2 << 20, "Largest body of a request.", unit="bytes", minimum=1)

    def check(self) -> None:
        for url in self.replica_url:
            if not re.fullmatch(r"https?://[^/\s]+/?", url):
                raise ModelLinkError(f"{url!r} is no address of a server", where="--replica-url", fix="write it as http://HOST:PORT")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.key and not self.replica_url:
            print(f"note: listening at {self.host} without an API key: everybody who reaches it can use the model",
                  file=sys.stderr)

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("MODELLINK_API_KEY") or None
