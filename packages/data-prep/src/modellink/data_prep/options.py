"""What preprocessing is told and what it tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from modellink.data_prep.engines import Choice
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` is told; the command's options are made from this."""

    input: tuple[str, ...] = option(doc="files, folders or quoted patterns: .jsonl, .json, .csv, .txt (also .gz and .zst), "
                                    ".parquet, .arrow; for LlamaFactoryInstructionHandler names in dataset_info.json")
    output_prefix: Path = option(doc="where results go: PREFIX_KEY_document.bin and .idx; the folder is made")
    tokenizer_name_or_path: Path = option(doc="folder with tokenizer.json, tokenizer.model or a .tiktoken file")
    tokenizer_type: Literal["PretrainedFromHF"] = option("PretrainedFromHF", "kind of tokenizer")
    tokenizer_backend: Choice = option("auto", "library that tokenizes; auto is gigatoken where it is installed and gives the "
                                       "same ids, else what the folder's files need")
    verify_tokenizer: bool = option(False, "compare gigatoken's ids with those of tokenizers for every document")
    handler_name: str = option("GeneralPretrainHandler", "how rows are read")
    json_keys: tuple[str, ...] = option(("text",), "columns to tokenize, each into a dataset of its own", alias="--json-key")
    map_keys: str | None = option(None, "JSON of what the columns of an instruction set are called, e.g. "
                                  "'{\"prompt\": \"question\", \"tags\": {\"role_tag\": \"role\"}}'")
    dataset_dir: Path | None = option(None, "folder of dataset_info.json")
    prompt_type: str | None = option(None, "template by name: empty, default, chatglm2, chatglm3, chatglm3_system, glm4, chatml, "
                                     "chatml_de, qwen, llama2, llama3, mistral, mixtral, gemma, alpaca, deepseek2, "
                                     "deepseek2-lite")
    template: Path | None = option(None, "template of your own, a JSON file")
    hf_chat_template: bool = option(False, "use the tokenizer's own chat template")
    train_on_prompt: bool = option(False, "learn all tokens of a sample, not only what the assistant says")
    seq_length: int | None = option(None, "most tokens of a sample (instruction sets)", unit="tokens", minimum=2)
    long_samples: Literal["cut", "drop"] = option("cut", "what becomes of longer samples: cut so that part of an answer stays, "
                                                  "or dropped as the original did")
    pack: bool = option(False, "put several samples into one of exactly --seq-length tokens")
    neat_pack: bool = option(False, "the later original's name for --pack; the same here")
    append_eod: bool = option(False, "end each document or sample with the end token (eos)")
    workers: int = option(1, "processes; one alone tokenizes on all cores too, but reads and writes on one", minimum=1)
    piece: str | None = option(None, "i/N: do only the i-th of N shares (from 0), for jobs on several machines with one disk; "
                               "the command without it, run last, joins them")
    executor: Literal["local", "ray"] = option("local", "where the work runs: on this machine, or on a Ray cluster with one disk")
    output_dtype: Literal["auto", "int32"] = option("auto", "token type: auto is uint16 below 65,500 ids and else int32; int32 "
                                                    "is what the original always wrote")
    vocab_size: int | None = option(None, "the model's vocabulary; an id beyond it is an error", unit="ids", minimum=1)
    on_bad_row: Literal["fail", "skip"] = option("fail", "what to do with a row that is broken or no text")
    piece_size: float = option(8.0, "input of one piece of work; changes no result", unit="MiB", minimum=0.001)
    overwrite: bool = option(False, "replace an output that exists")
    summary: Path | None = option(None, "write the summary to this file as JSON too")

    @property
    def packs(self) -> bool:
        return self.pack or self.neat_pack

    @property
    def share(self) -> tuple[int, int] | None:
        """`--piece` as numbers.

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
    """What came out.

    Attributes:
        outputs: name of the output to the prefix of its dataset.
        documents, tokens: counts by output, as they are in the files (of packs with their padding).
        rows, skipped_rows: rows used and rows left out; `bad_rows` names the first of these.
        cut_samples, dropped_samples: samples longer than --seq-length, by what became of them.
        empty_samples: left out because a question or an answer is empty.
        learned_tokens: tokens with a label, of instruction sets.
        packs, fill: number of packs, and the part of them that is not padding.
        text_bytes: UTF-8 bytes of the texts used.
        dtype: of the tokens on disk.
        backend: library and version that tokenized; `backend_why` why it was chosen.
        seconds: of this run; `tokens_per_second` counts what this run tokenized, not what it found done.
        pieces, pieces_found_done: of the work, all and those an earlier run had finished.
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
