# SPDX-License-Identifier: Apache-2.0
"""A model family of another package, whose layers differ, trains and equals transformers; no file of ours is edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PLUGIN = Path(__file__).with_name("plugin")


def test_layers_without_rotary_embedding(tmp_path):
    """The loss of the first step at two layouts, by the plugin's method with plain cross-entropy."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SmolLM3Config(
        hidden_size=48, intermediate_size=112, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=20,
        vocab_size=131, max_position_embeddings=64, no_rope_layers=[1, 0, 1, 1], tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that positions matter
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "smollm3-plugin"}))
    rows = torch.randint(0, 131, (4, 25), generator=torch.Generator().manual_seed(4))
    (tmp_path / "rows.json").write_text(json.dumps(rows.tolist()))
    logits = model(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    for layer in model.model.layers:
        layer.self_attn.use_rope = True
    other = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert abs(other - expected) > 1e-3  # the layers without rotary embedding make a difference
    for layout in ([], ["--pipeline-model-parallel-size", "2"]):  # two ways to number the layers
        save = tmp_path / f"save{len(layout)}"
        arguments = ["focal", "--gamma", "0", "--sequences", tmp_path / "rows.json", "--load", tmp_path / "model", "--save", save,
                     "--seq-length", "24", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3",
                     "--train-iters", "1", "--eval-iters", "0", "--device", "cpu", "--log-interval", "1", *layout]
        done = subprocess.run([sys.executable, "-m", "modellink.core.cli", *map(str, arguments)], capture_output=True,
                              text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(PLUGIN)})
        assert done.returncode == 0, done.stderr
        (step,) = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        assert step["loss"] == pytest.approx(expected, rel=2e-6)
