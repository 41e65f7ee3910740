# SPDX-License-Identifier: Apache-2.0
"""Tiny models with unusual shapes, and the command as a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modellink.ckpt_convert.cli import main

sys.path.append(str(Path(__file__).parent))  # for tiny_models: tests are not a package
torch.set_num_threads(1)  # a forked process must not inherit a thread pool

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 20, "intermediate_size": 36,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 131,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "rope_scaling": None, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2}
QWEN2: dict[str, Any] = {key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias")} | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 24, "num_attention_heads": 8,
    "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": None}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}, "unk_token": "<unk>"}}


def random_weights(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return all tensors of the model under Hugging Face names; norms and biases are random too."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, vocab, size = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    heads, groups = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.input_layernorm.weight": (hidden,), f"{start}.post_attention_layernorm.weight": (hidden,),
                   f"{start}.mlp.gate_proj.weight": (ffn, hidden), f"{start}.mlp.up_proj.weight": (ffn, hidden),
                   f"{start}.mlp.down_proj.weight": (hidden, ffn), f"{start}.self_attn.o_proj.weight": (hidden, heads)}
        for name, rows in [("q", heads), ("k", groups), ("v", groups)]:
            shapes[f"{start}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                shapes[f"{start}.self_attn.{name}_proj.bias"] = (rows,)
        if config.get("attention_bias"):
            shapes[f"{start}.self_attn.o_proj.bias"] = (hidden,)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test simulates a power cut, and the page cache survives a killed process: waiting for the disk would prove nothing."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model("llama" or "qwen2", name=..., dtype=..., **changes of the config): a Hugging Face folder."""

    def make(family: str, *, name: str = "hf", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        config = {"llama": LLAMA, "qwen2": QWEN2}[family] | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
        folder = tmp_path / name
        folder.mkdir()
        save_file(random_weights(config, dtype), folder / "model.safetensors", metadata={"format": "pt"})
        for file, content in [("config.json", config), ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
                              ("tokenizer.json", TOKENIZER), ("tokenizer_config.json", {
                                  "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"})]:
            (folder / file).write_text(json.dumps(content))
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        (folder / "modeling_evil.py").write_text("raise SystemExit('code from a checkpoint ran')")
        return folder

    return make


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run(["SRC", "DST", ...], KEY="value"): the command with these arguments and environment variables.

    It runs in a process forked from this one, with its own output and exit status: starting Python and torch each time would take
    most of the tests' time. test_light.py and test_plugins.py start it as a new process.
    """

    def call(arguments: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
        texts = [tmp_path_factory.mktemp("output") / name for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(torch.get_num_threads())  # creates torch's pool again, before several threads do so at once
                for number, path in enumerate(texts, 1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
                sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
                os.environ.update(environment)
                sys.argv = ["modellink-convert", *map(str, arguments)]
                main()
            except SystemExit as done:
                os._exit(done.code if isinstance(done.code, int) else 1)
            finally:
                os._exit(99)
        _, status = os.waitpid(child, 0)
        outputs = [path.read_text() if path.exists() else "" for path in texts]
        return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), *outputs)

    return call


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """content(folder): relative name -> bytes of every file below it."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    return read
