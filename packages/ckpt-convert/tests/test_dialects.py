# SPDX-License-Identifier: Apache-2.0
"""Megatron-Legacy, grouped experts and the original's names: the content of the files, and bit-equal conversions back.

The layouts are implemented again here with plain tensor operations, from the description of the formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from states import load_state
from tiny_models import MODELS, make_folder, spec_of

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.ckpt_convert.megatron.dialects import named, renamed
from modellink.ckpt_convert.storage.tensors import Stored
from modellink.ckpt_convert.storage.writing import Planned
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

LATENT = ["deepseek_v2", "deepseek_v2 lite"]
MIXTURES = [name for name in MODELS if spec_of(name)[1].num_experts]
WITHOUT_LEGACY = [*MIXTURES, "gemma2"]


def states(root: Path) -> dict[str, dict[str, Any]]:
    """Return name of a rank's folder -> its file, as torch reads it."""
    return {path.parent.name: load_state(path) for path in sorted(root.rglob("model_optim_rng.pt"))}


def same(before: dict[str, torch.Tensor], folder: Path) -> bool:
    after = load_file(folder / "model.safetensors")
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def qkv(tensors: dict[str, torch.Tensor], start: str, kind: str, groups: int, size: int) -> torch.Tensor:
    """Return the fused matrix: group by group its queries, its key, its value."""
    query, key, value = (tensors[f"{start}.self_attn.{name}_proj.{kind}"] for name in "qkv")
    rest = query.shape[1:]
    per_group = len(query) // groups
    parts = [query.view(groups, per_group, *rest), key.view(groups, size, *rest), value.view(groups, size, *rest)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


@pytest.mark.parametrize(("model", "layout"), [
    *((name, ParallelLayout(tp=2, pp=2, vpp=2)) for name in MODELS if name not in WITHOUT_LEGACY),
    ("llama", ParallelLayout(pp=3, num_layer_list=(1, 2, 1)))], ids=str)
def test_legacy_there_and_back(model: str, layout: ParallelLayout, tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of(model))
    convert(tmp_path / "hf", tmp_path / "legacy", to="megatron-legacy", layout=layout, verify=True)
    opened = open_checkpoint(tmp_path / "legacy")
    assert opened.format == "Megatron-Legacy" and opened.layout == layout
    convert(tmp_path / "legacy", tmp_path / "core", to="megatron-core", layout=ParallelLayout(tp=2))
    convert(tmp_path / "core", tmp_path / "back", to="hf")
    assert same(before, tmp_path / "back")


def test_what_a_legacy_file_holds(tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("qwen2", untie_embeddings_and_output_weights=False), torch.float32)
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-legacy", layout=ParallelLayout(tp=2, pp=2))
    for folder, state in states(tmp_path / "mg").items():
        rank, stage = int(folder[8:10]), int(folder[-3:])
        table = before["model.embed_tokens.weight"]
        table = torch.cat([table, table[-1:]]).chunk(2)[rank]
        model = state["model"]
        encoder = model["language_model"]["encoder"]
        assert state["checkpoint_version"] == 3.0 and not state["args"].use_mcore_models
        if stage == 0:
            assert model.keys() == {"language_model"} and model["language_model"].keys() == {"embedding", "encoder"}
            assert torch.equal(model["language_model"]["embedding"]["word_embeddings"]["weight"], table)
        else:  # tied, several stages: the copy of the embedding is outside of the language model
            assert model.keys() == {"language_model", "word_embeddings_for_head"}
            assert model["language_model"].keys() == {"encoder"}
            assert torch.equal(model["word_embeddings_for_head"]["weight"], table)
            assert torch.equal(encoder["final_norm.weight"], before["model.norm.weight"])
        for layer in range(2):
            start, ours = f"model.layers.{2 * stage + layer}", f"layers.{layer}"
            for kind in ("weight", "bias"):
                fused = qkv(before, start, kind, groups=4, size=6).chunk(2)[rank]
                assert torch.equal(encoder[f"{ours}.self_attention.query_key_value.{kind}"], fused)
            gate, up = (before[f"{start}.mlp.{name}_proj.weight"].chunk(2)[rank] for name in ("gate", "up"))
            assert torch.equal(encoder[f"{ours}.mlp.dense_h_to_4h.weight"], torch.cat([gate, up]))
            down = before[f"{start}.mlp.down_proj.weight"].chunk(2, dim=1)[rank]
            assert torch.equal(encoder[f"{ours}.mlp.dense_4h_to_h.weight"], down)
            assert torch.equal(encoder[f"{ours}.input_norm.weight"], before[f"{start}.input_layernorm.weight"])
            assert torch.equal(encoder[f"{ours}.post_attention_norm.weight"], before[f"{start}.post_attention_layernorm.weight"])


def test_an_untied_head_and_a_norm_behind_the_embedding(tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("bloom"))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-legacy")
    embedding = states(tmp_path / "mg")["mp_rank_00"]["model"]["language_model"]["embedding"]
    assert torch.equal(embedding["word_embeddings"]["norm.bias"], before["transformer.word_embeddings_layernorm.bias"])
    before = make_folder(tmp_path / "untied", *spec_of("llama"))
    convert(tmp_path / "untied", tmp_path / "mg2", to="megatron-legacy")
    model = states(tmp_path / "mg2")["mp_rank_00"]["model"]["language_model"]
    assert torch.equal(model["output_layer"]["weight"], before["lm_head.weight"])


def test_names_of_older_megatron_versions(tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("llama"))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-legacy")
    path = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    state = load_state(path)
    older = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "final_norm": "final_layernorm",
             "self_attention": "attention"}
    encoder = state["model"]["language_model"].pop("encoder")
    for new, old in older.items():
        encoder = {name.replace(new, old): tensor for name, tensor in encoder.items()}
    state["model"]["language_model"]["transformer"] = encoder
    torch.save(state, path)
    (tmp_path / "mg/iter_0000001/modellink.complete").unlink()
    (tmp_path / "mg/modellink.json").unlink()
    convert(tmp_path / "mg", tmp_path / "back", to="hf", hf=tmp_path / "hf")
    assert same(before, tmp_path / "back")


@pytest.mark.parametrize("model", WITHOUT_LEGACY)
def test_legacy_has_no_names_for_some_models(model: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of(model))
    with pytest.raises(ModelLinkError, match="Megatron-Legacy has no name for decoder"):
        convert(tmp_path / "hf", tmp_path / "mg", to="megatron-legacy")
    assert not (tmp_path / "mg").exists() and not (tmp_path / "mg.tmp").exists()


def test_an_old_order_of_queries_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of("llama"))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-legacy")
    path = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    torch.save(load_state(path) | {"checkpoint_version": 1.0}, path)
    (tmp_path / "mg/iter_0000001/modellink.complete").unlink()
    (tmp_path / "mg/modellink.json").unlink()
    with pytest.raises(ModelLinkError, match=r"version 1\.0"):
        open_checkpoint(tmp_path / "mg", hf=tmp_path / "hf")


@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("dialect", ["megatron-core", "modellink-1.0"])
@pytest.mark.parametrize("grouped", [False, True], ids=["local", "grouped"])
def test_experts_and_dialects_there_and_back(model: str, dialect: Any, grouped: bool, tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of(model))
    layout = ParallelLayout(tp=2, pp=2, ep=2)
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-core", layout=layout, dialect=dialect, moe_grouped_gemm=grouped,
            verify=True)
    opened = open_checkpoint(tmp_path / "mg")
    assert opened.layout == layout and ("grouped experts" in opened.format) == grouped
    convert(tmp_path / "mg", tmp_path / "back", to="hf")
    assert same(before, tmp_path / "back")


def test_what_grouped_experts_look_like(tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("mixtral"))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-core", layout=ParallelLayout(tp=2, ep=2), moe_grouped_gemm=True)
    for folder, state in states(tmp_path / "mg").items():
        rank, expert_rank = int(folder[8:10]), int(folder[-3:])
        first, second = [], []
        for expert in (2 * expert_rank, 2 * expert_rank + 1):
            start = f"model.layers.3.block_sparse_moe.experts.{expert}"
            gate, up = (before[f"{start}.{name}.weight"].chunk(2)[rank] for name in ("w1", "w3"))
            first.append(torch.cat([gate, up]).T)
            second.append(before[f"{start}.w2.weight"].chunk(2, dim=1)[rank].T)
        found = state["model"]
        assert torch.equal(found["decoder.layers.3.mlp.experts.weight1"], torch.stack(first).view(20, -1))
        assert torch.equal(found["decoder.layers.3.mlp.experts.weight2"], torch.cat(second))
        assert not any("local_experts" in name for name in found) and state["args"].moe_grouped_gemm


@pytest.mark.parametrize("model", LATENT)
def test_what_the_originals_latent_attention_looks_like(model: str, tmp_path: Path) -> None:
    """At TP 2 compressed projections are replicated and heads are split; queries without compression are heads too."""
    before = make_folder(tmp_path / "hf", *spec_of(model))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-core", layout=ParallelLayout(tp=2), dialect="modellink-1.0")
    for folder, state in states(tmp_path / "mg").items():
        rank, model_state = int(folder[8:10]), state["model"]
        theirs, ours = "model.layers.1.self_attn.", "decoder.layers.1.self_attention."
        keys = before[theirs + "kv_a_proj_with_mqa.weight"]
        if model == "deepseek_v2":
            queries = before[theirs + "q_a_proj.weight"]
            up = before[theirs + "q_b_proj.weight"].chunk(2)[rank]
            assert torch.equal(model_state[ours + "linear_qb.weight"], up)
            assert torch.equal(model_state[ours + "q_layernorm.weight"], before[theirs + "q_a_layernorm.weight"])
        else:
            queries = before[theirs + "q_proj.weight"].chunk(2)[rank]
        assert torch.equal(model_state[ours + "linear_qkv.weight"], torch.cat([queries, keys]))
        assert torch.equal(model_state[ours + "linear_kvb.weight"], before[theirs + "kv_b_proj.weight"].chunk(2)[rank])
        assert torch.equal(model_state[ours + "k_layernorm.weight"], before[theirs + "kv_a_layernorm.weight"])
        down = before["model.layers.1.mlp.shared_experts.down_proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(model_state["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"], down)


def test_the_gate_of_shared_experts(tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("qwen2_moe"))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-core", dialect="modellink-1.0")
    found = states(tmp_path / "mg")["mp_rank_00"]["model"]["decoder.layers.2.mlp.shared_expert_gate.weight"]
    assert torch.equal(found, before["model.layers.2.mlp.shared_expert_gate.weight"])


@pytest.mark.parametrize("model", ["deepseek_v2 lite", "qwen2_moe"])
def test_tensors_that_the_original_copied_whole_to_every_rank(model: str, tmp_path: Path) -> None:
    """At TP above 1 its converter replicated latent attention, shared and grouped experts; such files are read too."""
    before = make_folder(tmp_path / "hf", *spec_of(model))
    style: dict[str, Any] = {"to": "megatron-core", "dialect": "modellink-1.0", "moe_grouped_gemm": True}
    convert(tmp_path / "hf", tmp_path / "one", **style)
    convert(tmp_path / "hf", tmp_path / "two", layout=ParallelLayout(tp=2), **style)
    (whole,) = states(tmp_path / "one").values()
    for folder, state in states(tmp_path / "two").items():
        for name in state["model"]:
            if any(part in name for part in ("experts", "linear_kvb", "linear_qkv")) and (
                    "linear_qkv" not in name or model.startswith("deepseek")):
                state["model"][name] = whole["model"][name]
        torch.save(state, tmp_path / f"two/iter_0000001/{folder}/model_optim_rng.pt")
    (tmp_path / "two/iter_0000001/modellink.complete").unlink()
    (tmp_path / "two/modellink.json").unlink()
    convert(tmp_path / "two", tmp_path / "back", to="hf", hf=tmp_path / "hf")
    assert same(before, tmp_path / "back")


def test_a_grouped_tensor_of_another_size(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of("mixtral"))
    convert(tmp_path / "hf", tmp_path / "mg", to="megatron-core", moe_grouped_gemm=True)
    path = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    state = load_state(path)
    state["model"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(20, 287)
    torch.save(state, path)
    (tmp_path / "mg/iter_0000001/modellink.complete").unlink()
    (tmp_path / "mg/modellink.json").unlink()
    with pytest.raises(ModelLinkError, match=r"weight1 has the shape \[20, 287\], which does not fit 4 experts"):
        open_checkpoint(tmp_path / "mg", hf=tmp_path / "hf")


def test_grouped_experts_have_no_biases() -> None:
    planned = Planned(torch.float32, (3,), lambda: iter(()))
    with pytest.raises(ModelLinkError, match=r"cannot hold .*local_experts\.1\.linear_fc1\.bias"):
        named({"decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.bias": planned}, "megatron-core", grouped=True)


@pytest.mark.parametrize(("projection", "norm"), [("linear_qkv", "k_layernorm"), ("linear_kvb", "kv_layernorm")])
def test_a_norm_of_keys_is_only_renamed_in_latent_attention(projection: str, norm: str) -> None:
    """The original calls DeepSeek's norm of compressed keys and values `k_layernorm`; in other models it is a norm of keys."""
    start, stored = "decoder.layers.0.self_attention.", Stored(Path("x"), 0, "float32", (6,))
    state = {f"{start}{projection}.weight": stored, f"{start}q_layernorm.weight": stored, f"{start}k_layernorm.weight": stored}
    assert f"{start}{norm}.weight" in renamed(state) and f"{start}q_layernorm.weight" in renamed(state)
    planned = Planned(torch.float32, (6,), lambda: iter(()))
    ours = {"linear_qkv": "linear_qkv", "linear_kvb": "linear_kv_up_proj"}[projection]
    chunk = {f"{start}{ours}.weight": planned, f"{start}{norm}.weight": planned}
    assert f"{start}k_layernorm.weight" in named(chunk, "modellink-1.0", grouped=False)
