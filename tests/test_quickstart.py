# SPDX-License-Identifier: Apache-2.0
"""The quickstart on a tiny random model: all its commands, at one layout, in order.

The session `quickstart` runs it with real weights; this test checks that the commands fit together.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A Hugging Face folder with three query groups and its own tokenizer."""
    import pydoc_data.topics

    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("weights")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainers.BpeTrainer(
        vocab_size=501, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                         chat_template=CHATML).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=48, intermediate_size=114, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=20,
        vocab_size=501, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )).save_pretrained(folder)
    return folder


def test_every_command_of_the_quickstart(weights, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/quickstart/run.py"), "--weights", str(weights), "--folder", str(tmp_path),
         "--iterations", "10", "--seq-length", "48", "--lr", "1e-2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in ("(status 2: refused, as it should be)", "iterations 6 to 10: losses and gradient norms are equal to the bit",
                 "largest difference", "documents of the data: ", "what it took", "boolq acc = ", "mmlu acc = ", "loss at tp3: "):
        assert said in done.stdout
    steps = json.loads((tmp_path / "tp3" / "steps.json").read_text())
    assert len(steps) == 14 and all(step["seconds"] > 0 for step in steps)
    kept = {path.name for path in (tmp_path / "tp3").iterdir()}
    assert kept == {"megatron", "straight", "resumed", "events", "hf", "eval-boolq", "eval-mmlu", "steps.json"}


@pytest.mark.stress
def test_every_layout_gives_the_same_losses(tmp_path):
    """The quickstart with real weights at all four layouts; it compares their losses."""
    for layout in ("tp3", "tp1pp2", "dp2", "tp3pp2"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples/quickstart/run.py"), "--folder", str(tmp_path), "--layout", layout],
            cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("largest relative difference from") == 3
