"""A model larger than the memory a process may have is converted, in every direction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED = 200 << 20  # bytes of private memory above those of the program before it starts
LIMITED = """
import resource, sys
import modellink.ckpt_convert.cli as cli
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv.pop(1)),) * 2)
cli.main()
"""


def limited(allowed: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LIMITED, str(allowed), *map(str, arguments)], capture_output=True, text=True,
                          check=False, timeout=120)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """540 MB in bf16, of which the embedding alone is 256 MB; the file has a hole instead of numbers."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 1024,
              "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 65536,
              "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (65536, 2048), "lm_head.weight": (65536, 2048), "model.norm.weight": (2048,),
              f"{layer}input_layernorm.weight": (2048,), f"{layer}post_attention_layernorm.weight": (2048,),
              f"{layer}self_attn.q_proj.weight": (2048, 2048), f"{layer}self_attn.o_proj.weight": (2048, 2048),
              f"{layer}self_attn.k_proj.weight": (1024, 2048), f"{layer}self_attn.v_proj.weight": (1024, 2048),
              f"{layer}mlp.gate_proj.weight": (1024, 2048), f"{layer}mlp.up_proj.weight": (1024, 2048),
              f"{layer}mlp.down_proj.weight": (2048, 1024)}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    folder = tmp_path_factory.mktemp("large") / "hf"
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("target", ["megatron-core", "megatron-legacy", "torch_dist", "hf"])
def test_a_model_larger_than_the_memory(target: str, large: Path, tmp_path: Path) -> None:
    cut = ["--tp", "2"] if target.startswith("megatron") else []
    done = limited(ALLOWED, large, tmp_path / "out", "--to", target, *cut, "--params-dtype", "fp16", "--workers", "2")
    assert done.returncode == 0, done.stderr
    back = limited(ALLOWED, tmp_path / "out", tmp_path / "back", "--to", "hf", "--verify", "--no-verify-model", "--workers", "2")
    assert back.returncode == 0, back.stderr


def test_the_limit_is_one(large: Path, tmp_path: Path) -> None:
    """With room for the threads and not for their blocks a conversion fails, so the tests above prove something."""
    done = limited(40 << 20, large, tmp_path / "out", "--to", "hf", "--params-dtype", "fp32", "--workers", "2")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
