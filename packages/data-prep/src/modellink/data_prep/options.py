# SPDX-License-Identifier: Apache-2.0
"""The options and the summary of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from modellink.data_prep.engines import Choice
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Options of `preprocess` and of the command."""

    input: tuple[str, ...] = option(doc="Files, folders or quoted patterns: .jsonl, .json, .csv, .txt (also .gz and .zst), "
                                    ".parquet, .arrow. For LlamaFactoryInstructionHandler: names in dataset_info.json.",
                                    heading="Input")
    handler_name: str = option("GeneralPretrainHandler", "How rows are read.")
    json_keys: tuple[str, ...] = option(("text",), "Columns to tokenize, each into its own dataset.", alias="--json-key")
    map_keys: str | None = option(None, "Column names of an instruction set as JSON, e.g. "
                                  "'{\"prompt\": \"question\", \"tags\": {\"role_tag\": \"role\"}}'")
    dataset_dir: Path | None = option(None, "Folder of dataset_info.json.")
    on_bad_row: Literal["fail", "skip"] = option("fail", "What to do with a row that is broken or is not text.")
    tokenizer_name_or_path: Path = option(doc="Folder with tokenizer.json, tokenizer.model or a .tiktoken file.",
                                          heading="Tokenizer")
    tokenizer_type: Literal["PretrainedFromHF"] = option("PretrainedFromHF", "Kind of tokenizer.")
    tokenizer_backend: Choice = option("auto", "Tokenizer library. auto: gigatoken if it is installed and gives the same ids, "
                                       "else the library that the folder's files need.")
    verify_tokenizer: bool = option(False, "Compare the ids of gigatoken with those of tokenizers for every document.")
    append_eod: bool = option(False, "End each document or sample with the end token (eos).")
    vocab_size: int | None = option(None, "Vocabulary size of the model; an id beyond it is an error.", unit="ids", minimum=1)
    prompt_type: str | None = option(
        None, "Name of a prompt template: empty, default, chatglm2, chatglm3, chatglm3_system, glm4, chatml, chatml_de, qwen, "
        "llama2, llama3, mistral, mixtral, gemma, alpaca, deepseek2, deepseek2-lite.", heading="Instruction data")
    template: Path | None = option(None, "Your own prompt template, a JSON file.")
    hf_chat_template: bool = option(False, "Use the chat template of the tokenizer.")
    train_on_prompt: bool = option(False, "Train on all tokens of a sample, not only on those of the assistant.")
    seq_length: int | None = option(None, "Maximum number of tokens of a sample (instruction sets).", unit="tokens", minimum=2)
    long_samples: Literal["cut", "drop"] = option("cut", "Longer samples are cut such that part of each answer stays, or "
                                                  "dropped as by the original.")
    pack: bool = option(False, "Pack several samples into sequences of exactly --seq-length tokens.")
    neat_pack: bool = option(False, "Same as --pack (the name in later versions of the original).", listed=False)
    output_prefix: Path = option(doc="Prefix of the output files, PREFIX_KEY_document.bin and .idx. The folder is created.",
                                 heading="Output")
    output_dtype: Literal["auto", "int32"] = option("auto", "Token type. auto: uint16 below 65,500 ids, else int32, which "
                                                    "the original always wrote.")
    overwrite: bool = option(False, "Replace an existing output.")
    summary: Path | None = option(None, "Also write the summary to this file as JSON.")
    workers: int = option(1, "Worker processes. A single one also tokenizes on all cores, but reads and writes on one.",
                          minimum=1, heading="Execution")
    piece: str | None = option(None, "i/N: do only share i (from 0) of N, for jobs on several machines that share a disk. Run "
                               "the command without it last, to join the shares.")
    executor: Literal["local", "ray"] = option("local", "Run on this machine, or on a Ray cluster with a shared disk.")
    piece_size: float = option(8.0, "Input bytes per piece of work; does not change the result.", unit="MiB", minimum=0.001)

    @property
    def packs(self) -> bool:
        return self.pack or self.neat_pack

    @property
    def share(self) -> tuple[int, int] | None:
        """Return `--piece` as (i, N), or None.

        Raises:
            ModelLinkError: it is not i/N with 0 <= i < N.
        """
        if self.piece is None:
            return None
        index, _, count = self.piece.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ModelLinkError(f"--piece is {self.piece!r}, it must be i/N with i from 0 to N - 1", where="--piece",
                                 fix="e.g. --piece 0/4 to --piece 3/4")
        return int(index), int(count)


@dataclass
class Summary:
    """The result of a run.

    Attributes:
        outputs: prefix of the dataset of each output, by name.
        documents, tokens: counts in the files by output (packs include their padding).
        rows, skipped_rows: rows used and rows skipped; `bad_rows` names the first skipped ones.
        cut_samples, dropped_samples: samples longer than --seq-length that were cut or dropped.
        empty_samples: samples skipped because a question or an answer is empty.
        learned_tokens: tokens with a label (instruction sets).
        packs, fill: number of packs, and the fraction of them that is not padding.
        text_bytes: UTF-8 bytes of the texts used.
        dtype: token type on disk.
        backend: tokenizer library and version; `backend_why`: why it was chosen.
        seconds: duration of this run; `tokens_per_second` counts only the tokens of this run.
        pieces, pieces_found_done: number of pieces, and of those that an earlier run had finished.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    skipped_rows: int = 0
    bad_rows: list[str] = field(default_factory=list)
    cut_samples: int = 0
    dropped_samples: int = 0
    empty_samples: int = 0
    learned_tokens: int = 0
    packs: int = 0
    fill: float = 0.0
    text_bytes: int = 0
    dtype: str = ""
    backend: str = ""
    backend_why: str = ""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    pieces: int = 0
    pieces_found_done: int = 0
