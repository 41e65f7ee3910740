"""Llama 1 to 3.3, SmolLM2, and everything that uses `model_type: llama`."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.hf_config import Config, rope_entries
from modellink.ckpt_convert.rules import Rules, query_key_value, stacked
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import EMBEDDING, FINAL_NORM, OUTPUT
from modellink.kernels.errors import ModelLinkError


@register
class Llama:
    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def read(self, config: Config) -> dict[str, Any]:
        config.refuse("mlp_bias", False)
        config.refuse("hidden_act", "silu")
        heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
        bias = config.get("attention_bias", False)
        return {"num_layers": config.count("num_hidden_layers"), "hidden_size": hidden, "num_attention_heads": heads,
                "num_query_groups": config.count("num_key_value_heads", heads), "vocab_size": config.count("vocab_size"),
                "kv_channels": config.count("head_dim", hidden // heads), "add_qkv_bias": bias, "add_dense_bias": bias,
                "ffn_hidden_size": config.count("intermediate_size"), "norm_epsilon": config.need("rms_norm_eps"),
                "max_position_embeddings": config.count("max_position_embeddings"),
                "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False), **config.rope()}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        if spec.add_qkv_bias != spec.add_dense_bias:
            raise ModelLinkError("a llama has attention biases everywhere or nowhere", where="add_qkv_bias, add_dense_bias",
                                 fix="with biases on query, key and value alone the family is qwen2")
        return {"architectures": [self.architecture], "model_type": self.model_type, "hidden_act": "silu",
                "num_hidden_layers": spec.num_layers, "hidden_size": spec.hidden_size, "intermediate_size": spec.ffn,
                "num_attention_heads": spec.num_attention_heads, "num_key_value_heads": spec.groups,
                "head_dim": spec.head_dim, "vocab_size": spec.vocab_size, "rms_norm_eps": spec.norm_epsilon,
                "max_position_embeddings": spec.max_position_embeddings, "tie_word_embeddings": spec.tied,
                "attention_bias": spec.add_qkv_bias, "mlp_bias": False, **rope_entries(spec)}

    def rules(self, spec: ModelSpec) -> Rules:
        vocab, hidden, ffn = spec.vocab_size, spec.hidden_size, spec.ffn
        rules = {EMBEDDING: stacked(("model.embed_tokens.weight", vocab)), FINAL_NORM: stacked(("model.norm.weight", hidden))}
        if not spec.tied:
            rules[OUTPUT] = stacked(("lm_head.weight", vocab))
        for number in range(spec.num_layers):
            ours, theirs = f"decoder.layers.{number}", f"model.layers.{number}"
            for kind in ["weight", "bias"] if spec.add_qkv_bias else ["weight"]:
                projections = [f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
                rules[f"{ours}.self_attention.linear_qkv.{kind}"] = query_key_value(spec, *projections)
            for kind in ["weight", "bias"] if spec.add_dense_bias else ["weight"]:
                rules[f"{ours}.self_attention.linear_proj.{kind}"] = stacked((f"{theirs}.self_attn.o_proj.{kind}", hidden))
            gate_up = stacked((f"{theirs}.mlp.gate_proj.weight", ffn), (f"{theirs}.mlp.up_proj.weight", ffn))
            rules |= {f"{ours}.input_layernorm.weight": stacked((f"{theirs}.input_layernorm.weight", hidden)),
                      f"{ours}.pre_mlp_layernorm.weight": stacked((f"{theirs}.post_attention_layernorm.weight", hidden)),
                      f"{ours}.mlp.linear_fc1.weight": gate_up,
                      f"{ours}.mlp.linear_fc2.weight": stacked((f"{theirs}.mlp.down_proj.weight", hidden))}
        return rules
