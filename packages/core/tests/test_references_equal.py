# SPDX-License-Identifier: Apache-2.0
"""The plain-PyTorch references of `references/` are right: equal to transformers where it has an equal.

transformers has no class for these families. A reference with some feature taken away or folded into the weights is a model that
transformers does have; logits and gradients must then agree. The references document what no class can confirm.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

checks = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "references" / "checks.py")))
MODULES, assert_equal, build, llama = checks.MODULES, checks.assert_equal, checks.build, checks.llama
random_tensors, tokens = checks.random_tensors, checks.tokens
Tensors = dict[str, Tensor]


def unpacked(tensors: Tensors) -> Tensors:
    """Baichuan's W_pack as query, key and value."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        if "W_pack" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("W_pack", f"{letter}_proj")] = part
        else:
            renamed[name] = value
    return renamed


def test_baichuan_7b_is_a_llama_with_its_projections_packed() -> None:
    module = MODULES["baichuan"]
    config = module.TINY["baichuan-7b"]
    assert_equal(module, config, llama(config), unpacked)


def test_baichuan2_7b_is_that_llama_under_a_normalized_head() -> None:
    module = MODULES["baichuan"]
    config = module.TINY["baichuan2-7b"]

    def rename(tensors: Tensors) -> Tensors:
        return unpacked(tensors) | {"lm_head.weight": torch.nn.functional.normalize(tensors["lm_head.weight"])}

    assert_equal(module, config, llama(config), rename)


def test_baichuan_13b_is_that_llama_with_blooms_alibi_for_rotary_embedding() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    module = MODULES["baichuan"]
    config = module.TINY["baichuan-13b"]
    heads = config["num_attention_heads"]
    bias = build_alibi_tensor(torch.ones(2, 24), heads, torch.float32).view(2, heads, 1, 24)
    mask = bias + torch.full((24, 24), float("-inf")).triu(1)
    # Where every position is zero nothing is rotated.
    assert_equal(module, config, llama(config), unpacked, attention_mask=mask, position_ids=torch.zeros(2, 24, dtype=torch.long))


@pytest.mark.parametrize("heads", [6, 32, 40])
def test_baichuans_slopes_are_blooms(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(MODULES["baichuan"].alibi_slopes(heads)), theirs)


@pytest.mark.parametrize("name", MODULES["chatglm"].TINY)
def test_chatglm_is_a_glm_with_its_projections_packed(name: str) -> None:
    module = MODULES["chatglm"]
    config = module.TINY[name]
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    model = build(
        "Glm", vocab_size=131, hidden_size=config["hidden_size"], intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"], num_attention_heads=heads, num_key_value_heads=groups, head_dim=size,
        rms_norm_eps=config["layernorm_epsilon"], attention_bias=True, tie_word_embeddings=False, pad_token_id=0,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0 * config.get("rope_ratio", 1), "partial_rotary_factor": 0.5})
    names = {"transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.encoder.final_layernorm": "model.norm",
             "transformer.output_layer": "lm_head", "transformer.encoder": "model", "self_attention.dense": "self_attn.o_proj",
             "self_attention": "self_attn", "dense_h_to_4h": "gate_up_proj", "dense_4h_to_h": "down_proj"}

    def rename(tensors: Tensors) -> Tensors:
        renamed: Tensors = {}
        for name, value in tensors.items():
            for old, new in names.items():
                name = name.replace(old, new)
            if "query_key_value" in name:
                parts = value.split((heads * size, groups * size, groups * size))
                renamed |= {name.replace("query_key_value", f"{letter}_proj"): part
                            for letter, part in zip("qkv", parts, strict=True)}
            else:
                renamed[name] = value
        return renamed

    assert_equal(module, config, model, rename)


@pytest.mark.parametrize("name", MODULES["internlm2"].TINY)
def test_internlm2_is_a_llama_with_its_groups_packed(name: str) -> None:
    module = MODULES["internlm2"]
    config = module.TINY[name]
    groups, queries = config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    rope = {"rope_type": "default", "rope_theta": float(config["rope_theta"])}
    if config["rope_scaling"]:
        rope |= {"rope_type": "dynamic", "factor": config["rope_scaling"]["factor"]}
    model = llama(config, rope_parameters=rope, attention_bias=config["bias"])
    names = {"tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "attention.wo": "self_attn.o_proj", "attention": "self_attn", "feed_forward.w1": "mlp.gate_proj",
             "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj", "output": "lm_head"}

    def rename(tensors: Tensors) -> Tensors:
        renamed: Tensors = {}
        for name, value in tensors.items():
            for old, new in names.items():
                name = name if "post_attention" in name else name.replace(old, new)
            if "wqkv" in name:
                parts = value.unflatten(0, (groups, queries + 2, -1)).split((queries, 1, 1), dim=1)
                renamed |= {name.replace("wqkv", f"{letter}_proj"): part.flatten(0, 2)
                            for letter, part in zip("qkv", parts, strict=True)}
            else:
                renamed[name] = value
        return renamed

    assert_equal(module, config, model, rename)


def test_dynamic_scaling_waits_for_a_longer_sequence() -> None:
    module = MODULES["internlm2"]
    config = module.TINY["internlm2 dynamic"]
    assert module.rotary_base(config, 16) == 1000000
    assert module.rotary_base(config, 24) == pytest.approx(1000000 * 2 ** (8 / 6))


@pytest.mark.parametrize("name", MODULES["qwen"].TINY)
def test_qwen_is_a_qwen2_with_its_projections_packed(name: str) -> None:
    module = MODULES["qwen"]
    config = module.TINY[name]
    heads = config["num_attention_heads"]
    model = build(
        "Qwen2", vocab_size=131, hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"] // 2,
        num_hidden_layers=config["num_hidden_layers"], num_attention_heads=heads, num_key_value_heads=heads,
        rms_norm_eps=config["layer_norm_epsilon"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])})
    names = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "transformer.h": "model.layers",
             "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
             "attn.c_attn": "self_attn.c_attn", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj"}

    def rename(tensors: Tensors) -> Tensors:
        renamed: Tensors = {}
        for name, value in tensors.items():
            for old, new in names.items():
                name = name.replace(old, new)
            if "c_attn" in name:
                renamed |= {name.replace("c_attn", f"{letter}_proj"): part
                            for letter, part in zip("qkv", value.chunk(3), strict=True)}
            else:
                renamed[name] = value
        return renamed

    assert_equal(module, config, model, rename)


def test_qwens_two_switches_act_in_evaluation_and_beyond_the_trained_length_alone() -> None:
    module = MODULES["qwen"]
    config = module.TINY["qwen-7b"]
    assert [module.rotary_base(config, length, training=False) for length in (8, 16)] == [10000, 10000]
    assert module.rotary_base(config, 17, training=False) == pytest.approx(10000 * 3 ** (8 / 6))
    assert module.rotary_base(config, 33, training=False) == pytest.approx(10000 * 7 ** (8 / 6))
    assert module.query_scale(config, 24, training=False)[:16].tolist() == [1] * 16
    assert module.query_scale(config, 24, training=False)[23] == pytest.approx(math.log(24) / math.log(16))
    tensors = random_tensors(module, config)
    for length, same in ((16, True), (24, False)):
        trained, evaluated = (module.logits(config, tensors, tokens(length), training=training) for training in (True, False))
        assert torch.equal(trained, evaluated) is same


def scaled_llama(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """MiniCPM's three scales worked into the weights of a Llama or Mixtral with a head of its own."""
    depth = config["scale_depth"] / config["num_hidden_layers"] ** 0.5
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding) / (config["hidden_size"] / config["dim_model_base"])
    scaled = {name: depth * value if "o_proj" in name or "down_proj" in name or "w2" in name else value
              for name, value in tensors.items()}
    return scaled | {"model.embed_tokens.weight": embedding * config["scale_emb"], "lm_head.weight": head}


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm untied"])
def test_minicpm_is_a_llama_with_its_scales_in_the_weights(name: str) -> None:
    module = MODULES["minicpm"]
    config = module.TINY[name]
    model = llama(config, tie_word_embeddings=False, rope_theta=config.get("rope_theta", 10000.0))
    assert_equal(module, config, model, lambda tensors: scaled_llama(config, tensors))


def test_minicpm_moe_is_a_mixtral_with_its_scales_in_the_weights() -> None:
    module = MODULES["minicpm"]
    config = module.TINY["minicpm-moe-8x2b"]
    model = build(
        "Mixtral", vocab_size=131, hidden_size=48, intermediate_size=112, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, rms_norm_eps=1e-5, num_local_experts=config["num_experts"], num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False, sliding_window=None)

    def rename(tensors: Tensors) -> Tensors:
        scaled = scaled_llama(config, tensors)
        renamed = {name: value for name, value in scaled.items() if "experts" not in name}
        for layer in range(4):
            name = f"model.layers.{layer}.mlp.experts."
            gate, down, up = ([scaled[f"{name}{e}.{part}.weight"] for e in range(10)] for part in ("w1", "w2", "w3"))
            pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            renamed |= {name + "gate_up_proj": torch.stack(pairs), name + "down_proj": torch.stack(down)}
        return renamed

    assert_equal(module, config, model, rename)


def test_grok_with_one_expert_is_a_gemma2_with_its_scales_in_the_weights() -> None:
    """Gemma2 has the four norms, the capped scores and the gated GELU; one expert always has the weight one."""
    module = MODULES["grok"]
    config = module.TINY["grok-1"] | {"num_experts": 1, "num_experts_per_tok": 1}
    hidden = config["hidden_size"]
    model = build(
        "Gemma2", vocab_size=131, hidden_size=hidden, intermediate_size=112, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, hidden_activation="gelu", rms_norm_eps=config["rms_norm_eps"],
        query_pre_attn_scalar=int(config["attn_output_multiplier"] ** -2), attn_logit_softcapping=config["max_attn_value"],
        final_logit_softcapping=None, tie_word_embeddings=False, layer_types=["full_attention"] * 4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    names = {"pre_attn_norm.scale": "input_layernorm.weight", "post_attn_norm.scale": "post_attention_layernorm.weight",
             "pre_moe_norm.scale": "pre_feedforward_layernorm.weight", "norm.scale": "norm.weight",
             "post_moe_norm.weight": "post_feedforward_layernorm.weight", "attn.": "self_attn.",
             "moe_block.experts.0.linear.": "mlp.gate_proj.", "moe_block.experts.0.linear_v.": "mlp.up_proj.",
             "moe_block.experts.0.linear_1.": "mlp.down_proj."}

    def rename(tensors: Tensors) -> Tensors:
        renamed: Tensors = {}
        for name, value in tensors.items():
            value = value - 1 if name.endswith("scale") else value  # Gemma adds one to the weight of a norm
            for old, new in names.items():
                name = name.replace(old, new)
            renamed |= {} if "gate.weight" in name else {name: value}
        embedding = tensors["model.embed_tokens.weight"]
        return renamed | {
            "model.embed_tokens.weight": embedding * config["embedding_multiplier_scale"] / hidden**0.5,
            "lm_head.weight": embedding * config["output_multiplier_scale"]}

    assert_equal(module, config, model, rename)


def test_groks_router_keeps_the_two_largest_probabilities_as_they_are() -> None:
    weights, chosen = MODULES["grok"].route(torch.tensor([2.0, 1.0, 4.0, 3.0]).log(), 2)
    assert chosen.tolist() == [2, 3]
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.3]))


def test_groks_mixture_adds_its_two_experts_by_those_weights() -> None:
    module = MODULES["grok"]
    config = {"num_experts": 4, "num_experts_per_tok": 2}
    one = torch.ones(1, 1)
    tensors = {"gate.weight": torch.tensor([[2.0], [1.0], [4.0], [3.0]]).log()}
    for e in range(4):
        tensors |= {f"experts.{e}.linear.weight": one * (e + 1), f"experts.{e}.linear_v.weight": 2 * one,
                    f"experts.{e}.linear_1.weight": 5 * one}
    gelu = [z * 0.5 * (1 + math.erf(z / 2**0.5)) for z in (3.0, 4.0)]
    torch.testing.assert_close(
        module.mixture(config, tensors, "", torch.ones(1, 1, 1)).squeeze(), torch.tensor(10 * (0.4 * gelu[0] + 0.3 * gelu[1])))


@pytest.mark.parametrize("name", MODULES["internlm"].TINY)
def test_internlm_is_a_llama_with_biases_in_attention(name: str) -> None:
    module = MODULES["internlm"]
    config = module.TINY[name]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if config.get("rotary", {}).get("type") == "dynamic":
        rope |= {"rope_type": "dynamic", "factor": 1.0}
    assert_equal(module, config, llama(config, rope_parameters=rope, attention_bias=config["bias"]), lambda tensors: tensors)


@pytest.mark.parametrize("name", MODULES["aquila"].TINY)
def test_aquila_is_a_llama(name: str) -> None:
    module = MODULES["aquila"]
    config = module.TINY[name]
    assert_equal(module, config, llama(config), lambda tensors: tensors)


def test_aquila_clamps_scores_that_a_llama_would_not() -> None:
    module = MODULES["aquila"]
    config = module.TINY["aquila-7b"]
    tensors = {name: value * (1000 if "q_proj" in name or "k_proj" in name else 1)
               for name, value in random_tensors(module, config).items()}
    theirs = torch.func.functional_call(llama(config), tensors, (tokens(),)).logits
    assert (module.logits(config, tensors, tokens()) - theirs).abs().max() > 0.1
