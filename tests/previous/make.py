# SPDX-License-Identifier: Apache-2.0
"""Make `files.tar.xz` and `record.json`: small files of every kind that users keep, written by the commit that is installed.

    python tests/previous/make.py                with the commands of the commit whose files are to be kept on PATH

Every command runs with relative paths inside an empty folder, so the files name no machine. Each run is stopped half-way and
its folder goes into the archive. The same commit then finishes the run in a copy, and `record.json` keeps the command and what
it printed or wrote.
`tests/test_previous_files.py` repeats these commands with today's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
WORDS = """paris is the capital of france . rome italy madrid spain berlin germany which city what where answer question
           yes no one two three four five river sea old new big small and or not in on at""".split()  # noqa: SIM905

TRAINING = ["--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "16", "--train-iters", "4", "--lr", "5e-2",
            "--lr-decay-style", "cosine", "--lr-warmup-iters", "1", "--log-interval", "1", "--eval-iters", "0"]
PRETRAIN = ["modellink-train", "pretrain", *TRAINING, "--data-path", "data/plain_text_document", "--split", "100,0,0",
            "--data-cache-path", "data/cache"]
SFT = ["modellink-train", "sft", *TRAINING, "--prompt-type", "chatml"]
LORA = ["--lora-target-modules", "linear_qkv", "linear_proj", "--lora-r", "2", "--lora-alpha", "4"]
RUNS: dict[str, tuple[list[str], str]] = {  # command, and the checkpoint it starts from
    "pretrain": (PRETRAIN, "hf"),
    "pretrain-tp2": ([*PRETRAIN, "--tensor-model-parallel-size", "2", "--use-distributed-optimizer",
                      "--save-format", "megatron-core"], "megatron-core"),
    "sft": ([*SFT, "--data-path", "data/chats", "--save-format", "megatron-legacy"], "megatron-legacy"),
    "sft-packed-lora": ([*SFT, *LORA, "--data-path", "data/packed", "--reset-position-ids"], "hf")}
"""Runs of two iterations out of four, by the name of their folder."""

PREPROCESS = ["modellink-preprocess", "--tokenizer-name-or-path", "hf", "--tokenizer-backend", "tokenizers"]
PLAIN = [*PREPROCESS, "--input", "plain.jsonl", "--append-eod", "--workers", "1", "--piece-size", "0.001"]
CHATS = [*PREPROCESS, "--input", "chats.jsonl", "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "chatml"]
EVAL = ["modellink-eval", "run", "--task", "boolq", "--task-data-path", "boolq", "--load", "hf", "--evaluation-batch-size", "2",
        "--output", "scores"]


def call(folder: Path, *command: str, kill_at: str | None = None) -> str:
    """Run a command in `folder` and return its output; `kill_at` names the point at which it is to die."""
    print("$", *command, flush=True)
    environment = {**os.environ, "COLUMNS": "120"} | ({"MODELLINK_KILL_AT": kill_at} if kill_at else {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != (-9 if kill_at else 0):
        raise SystemExit(f"status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def make_model(folder: Path) -> None:
    """A Hugging Face folder in bf16: random weights, a tokenizer of 101 words, a chat template."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *WORDS, *(f"w{number}" for number in range(101 - len(special) - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>", pad_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=special[2:]).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        vocab_size=101, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
        initializer_range=0.5)).to(torch.bfloat16).save_pretrained(folder)


def make_inputs(folder: Path) -> None:
    choose = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(least, most)))

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("plain.jsonl", [{"text": text(5, 40)} for _ in range(40)])
    write("chats.jsonl", [{"instruction": text(2, 4), "input": "", "output": text(1, 4)} for _ in range(24)])
    write("boolq/dev.jsonl", [{"passage": text(5, 20), "question": text(3, 6), "answer": choose.random() < 0.5}
                              for _ in range(9)])


def steps(folder: Path) -> list[list[float]]:
    """Iteration, loss and gradient norm of each line of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["iteration"], line["loss"], line["grad_norm"]] for line in lines]


def digests(*paths: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def make(folder: Path, after: Path) -> dict[str, Any]:
    """Write the files into `folder`, finish what was stopped in its copy `after`, and return the record."""
    make_inputs(folder)
    make_model(folder / "hf")
    call(folder, *PLAIN, "--output-prefix", "data/plain")
    call(folder, *CHATS, "--output-prefix", "data/chats", "--seq-length", "16")
    call(folder, *CHATS, "--output-prefix", "data/packed", "--seq-length", "16", "--pack")
    call(folder, *PLAIN, "--output-prefix", "stopped/plain", kill_at="piece-noted")
    call(folder, *EVAL, kill_at="after-batch")
    for form, layout in (("megatron-core", ["--tp", "2"]), ("megatron-legacy", ["--pp", "2"]), ("torch_dist", [])):
        call(folder, "modellink-convert", "hf", form, "--to", form, *layout)
    for name, (command, start) in RUNS.items():
        call(folder, *command, "--load", start, "--save", name, "--exit-interval", "2")
    shutil.copytree(folder, after)

    merge = ["modellink-convert", "hf", "merged", "--to", "hf", "--lora-load", "sft-packed-lora"]
    call(after, *merge)
    record: dict[str, Any] = {"merge": merge, "resumed": {}, "texts": {}}
    for load in ("hf", "megatron-core", "megatron-legacy", "torch_dist", "pretrain", "pretrain-tp2", "sft", "merged"):
        generate = ["modellink-infer", "generate", "--load", load, "--prompt", "paris is", "--max-new-tokens", "12",
                    "--no-do-sample", "--dtype", "float32", "--json", "--logprobs", "--no-native"]
        record["texts"][load] = {"command": generate, "said": json.loads(call(after, *generate))}
    for name, (command, start) in RUNS.items():
        base = start if "--lora-r" in command else name
        more = ["--lora-load", name] if "--lora-r" in command else []
        resume = [*command, "--load", base, *more, "--save", name]
        call(after, *resume)
        record["resumed"][name] = {"command": resume, "steps": steps(after / name)}
    command = [*PLAIN, "--output-prefix", "stopped/plain"]
    call(after, *command)  # from the start, since the journal knows the input's folder: the bytes are to be the same
    record["preprocess"] = {"command": command, "files": digests(*(after / "stopped").glob("plain_*"))}
    call(after, *EVAL)
    results = json.loads((after / "scores" / "results.json").read_text())
    record["eval"] = {"command": EVAL, "run": results.pop("run")["boolq"]["found answered"], "tasks": results["tasks"]}
    return record


def add(archive: tarfile.TarFile, folder: Path) -> None:
    """Add every file, in a fixed order and without owners and times."""
    for path in sorted(folder.rglob("*")):
        info = archive.gettarinfo(path, str(path.relative_to(folder)))
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        with path.open("rb") if path.is_file() else open(os.devnull, "rb") as file:
            archive.addfile(info, file)


def main() -> None:
    with tempfile.TemporaryDirectory() as top:
        before, after = Path(top, "before"), Path(top, "after")
        before.mkdir()
        record = make(before, after)
        with tarfile.open(HERE / "files.tar.xz", "w:xz", preset=9) as archive:
            add(archive, before)
    (HERE / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
