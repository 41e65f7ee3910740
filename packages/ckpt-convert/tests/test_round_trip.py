# SPDX-License-Identifier: Apache-2.0
"""Hugging Face -> Megatron-Core -> Hugging Face keeps every bit at every layout, and Megatron can load the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from states import load_state

from modellink.ckpt_convert import convert
from modellink.kernels.parallel import ParallelLayout

Make = Callable[..., Path]

CASES = {
    "llama-tp3-pp2": ("llama", ParallelLayout(tp=3, pp=2), {}),
    "llama-tied-tp3-pp2-bf16": ("llama", ParallelLayout(tp=3, pp=2), {"dtype": torch.bfloat16, "tie_word_embeddings": True}),
    "llama-biases-tp3": ("llama", ParallelLayout(tp=3), {"attention_bias": True}),
    "llama-uneven-stages": ("llama", ParallelLayout(pp=3, num_layer_list=(1, 2, 1)), {"tie_word_embeddings": True}),
    "llama-virtual-stages": ("llama", ParallelLayout(tp=3, pp=2, vpp=2), {"tie_word_embeddings": True}),
    "qwen2-tp2-pp2": ("qwen2", ParallelLayout(tp=2, pp=2), {"dtype": torch.bfloat16}),
    "qwen2-tied-tp4-fp16": ("qwen2", ParallelLayout(tp=4), {"dtype": torch.float16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_every_bit_back(case: str, make_model: Make, tmp_path: Path) -> None:
    family, layout, changes = CASES[case]
    source = make_model(family, **changes)
    convert(source, tmp_path / "mc", to="megatron-core", layout=layout, make_vocab_size_divisible_by=8)
    convert(tmp_path / "mc", tmp_path / "back", to="hf")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(tensor, after[name]), name


def test_files_beside_the_weights_travel_and_code_does_not(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    convert(source, tmp_path / "mc", to="megatron-core")
    convert(tmp_path / "mc", tmp_path / "back", to="hf")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"modeling_evil.py"} | {"modellink.checksums.json"}
    for name in names - {"model.safetensors", "config.json", "modellink.checksums.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_checksums_lie_beside(make_model: Make, tmp_path: Path) -> None:
    convert(make_model("llama"), tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=3))
    sums = json.loads((tmp_path / "mc/modellink.checksums.json").read_text())
    assert sums["algorithm"] == "xxh3_64" and len(sums["files"]) == 3
    for file, found in sums["files"].items():
        model = load_state(tmp_path / "mc" / file)["model"]
        assert found == {f"model.{name}": xxhash.xxh3_64_hexdigest(tensor.numpy()) for name, tensor in model.items()}


def reference_cut(weights: dict[str, torch.Tensor], config: dict[str, Any], tp: int, rank: int, layer: int,
                  padded: int) -> dict[str, torch.Tensor]:
    """The content of a Megatron rank for one layer and the embedding, implemented again with plain tensor operations."""
    groups, size = config["num_key_value_heads"], config["head_dim"]
    per_group = config["num_attention_heads"] // groups * size
    start = f"model.layers.{layer}"
    fused = {}
    for kind in ("weight", "bias"):
        query, key, value = (weights[f"{start}.self_attn.{name}_proj.{kind}"] for name in "qkv")
        rest = query.shape[1:]
        joined = torch.cat([query.view(groups, per_group, *rest), key.view(groups, size, *rest),
                            value.view(groups, size, *rest)], dim=1)
        fused[kind] = joined.reshape(-1, *rest).chunk(tp)[rank]
    gate, up = (weights[f"{start}.mlp.{name}_proj.weight"].chunk(tp)[rank] for name in ("gate", "up"))
    table = weights["model.embed_tokens.weight"]
    table = torch.cat([table, table[-1:].repeat(padded - len(table), 1)]).chunk(tp)[rank]
    return {"self_attention.linear_qkv.weight": fused["weight"], "self_attention.linear_qkv.bias": fused["bias"],
            "self_attention.linear_proj.weight": weights[f"{start}.self_attn.o_proj.weight"].chunk(tp, dim=1)[rank],
            "mlp.linear_fc1.weight": torch.cat([gate, up]),
            "mlp.linear_fc2.weight": weights[f"{start}.mlp.down_proj.weight"].chunk(tp, dim=1)[rank],
            "input_layernorm.weight": weights[f"{start}.input_layernorm.weight"],
            "pre_mlp_layernorm.weight": weights[f"{start}.post_attention_layernorm.weight"],
            "embedding.word_embeddings.weight": table}


def test_rank_files_hold_what_megatron_expects(make_model: Make, tmp_path: Path) -> None:
    source = make_model("qwen2", tie_word_embeddings=True)
    convert(source, tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=2, pp=2))
    config, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    for rank in range(2):
        for stage in range(2):
            file = tmp_path / f"mc/iter_0000001/mp_rank_{rank:02d}_{stage:03d}/model_optim_rng.pt"
            state = load_state(file)
            model = state["model"]
            for layer in range(2):
                expected = reference_cut(weights, config, 2, rank, 2 * stage + layer, 132)
                table = expected.pop("embedding.word_embeddings.weight")
                for name, tensor in expected.items():
                    assert torch.equal(model.pop(f"decoder.layers.{layer}.{name}"), tensor), name
            if stage == 0:
                assert torch.equal(model.pop("embedding.word_embeddings.weight"), table)
            else:
                assert torch.equal(model.pop("output_layer.weight"), table)
                assert torch.equal(model.pop("decoder.final_layernorm.weight"), weights["model.norm.weight"])
            assert not model
            assert state["checkpoint_version"] == 3.0 and state["iteration"] == 1
            args = state["args"]
            assert (args.num_layers, args.tensor_model_parallel_size, args.padded_vocab_size) == (4, 2, 132)
            assert args.params_dtype == torch.float32 and args.add_qkv_bias and args.group_query_attention
    assert (tmp_path / "mc/latest_checkpointed_iteration.txt").read_text() == "1"


def test_virtual_stages_hold_the_layers_megatron_gives_them(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    convert(source, tmp_path / "mc", to="megatron-core", layout=ParallelLayout(pp=2, vpp=2))
    weights = load_file(source / "model.safetensors")
    for stage in range(2):
        state = load_state(tmp_path / f"mc/iter_0000001/mp_rank_00_{stage:03d}/model_optim_rng.pt")
        for chunk in range(2):  # layer of chunk v on stage p of P: v * P + p, with one layer per chunk
            found = state[f"model{chunk}"]["decoder.layers.0.mlp.linear_fc2.weight"]
            assert torch.equal(found, weights[f"model.layers.{chunk * 2 + stage}.mlp.down_proj.weight"])


def test_shards_and_index(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama", dtype=torch.bfloat16)
    convert(source, tmp_path / "sharded", to="hf", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    before, after = load_file(source / "model.safetensors"), {}
    for path in shards:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000
        after |= load_file(path)
        assert all(index["weight_map"][name] == path.name for name in load_file(path))
    assert len(shards) > 2 and after.keys() == before.keys() == index["weight_map"].keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert convert(tmp_path / "sharded", tmp_path / "mc", to="megatron-core", verify=True).verified == 27


def test_change_of_layout_without_hugging_face_between(make_model: Make, tmp_path: Path, content: Any) -> None:
    source = make_model("qwen2")
    one, other = ParallelLayout(tp=4, pp=2), ParallelLayout(tp=2, pp=3, num_layer_list=(1, 1, 2))
    convert(source, tmp_path / "one", to="megatron-core", layout=one)
    convert(tmp_path / "one", tmp_path / "other", to="megatron-core", layout=other)
    convert(source, tmp_path / "straight", to="megatron-core", layout=other)
    assert content(tmp_path / "other") == content(tmp_path / "straight")


def test_cast(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    assert convert(source, tmp_path / "half", to="hf", params_dtype=torch.bfloat16, verify=True).verified == 27
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.sampled_from([1, 2, 4]), per_group=st.integers(1, 3), size=st.sampled_from([2, 6]),
       tp=st.sampled_from([1, 2, 4]), stages=st.lists(st.integers(1, 2), min_size=1, max_size=3), vocab=st.integers(3, 40),
       tied=st.booleans())
def test_any_shape_round_trips(groups: int, per_group: int, size: int, tp: int, stages: list[int], vocab: int, tied: bool,
                               make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = make_model("qwen2", name=str(folder / "hf"), num_attention_heads=groups * per_group, num_key_value_heads=groups,
                        head_dim=size, num_hidden_layers=sum(stages), vocab_size=vocab, tie_word_embeddings=tied)
    layout = ParallelLayout(tp=tp if groups % tp == 0 else 1, pp=len(stages), num_layer_list=tuple(stages))
    convert(source, folder / "mc", to="megatron-core", layout=layout, verify=True)
    convert(folder / "mc", folder / "back", to="hf")
    before, after = load_file(source / "model.safetensors"), load_file(folder / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
