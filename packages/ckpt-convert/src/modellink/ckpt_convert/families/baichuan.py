# SPDX-License-Identifier: Apache-2.0
"""Baichuan and Baichuan2, 7B and 13B: one tensor [query; key; value]; the 13B models have ALiBi, Baichuan2 a
normalized head.

All four have the same `model_type`. The 13B models give their longest sequence only as `model_max_length`;
only Baichuan2 has `z_loss_weight`, and its public vocabulary differs.
"""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, LLAMA_NAMES, Family, without
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import packed
from modellink.ckpt_convert.spec import ModelSpec

VOCABULARY_OF_BAICHUAN2 = 125696


@register
class Baichuan(Family):
    model_type = "baichuan"
    architecture = "BaichuanForCausalLM"
    others = ("BaiChuanForCausalLM", "baichuan2")
    keys = without(LLAMA_KEYS, "num_query_groups", "kv_channels", "max_position_embeddings")
    inert = ("gradient_checkpointing", "model_max_length")
    names = LLAMA_NAMES | {"self_attention.linear_qkv": packed("self_attn.W_pack")}

    def read(self, config: Config) -> dict[str, Any]:
        second = config.get("z_loss_weight") is not None or config.get("vocab_size") == VOCABULARY_OF_BAICHUAN2
        longest = config.get("max_position_embeddings", config.get("model_max_length"))
        values = super().read(config) | {"normalize_output_weights": second}
        return values if longest is None else values | {"max_position_embeddings": longest}

    def read_positions(self, config: Config) -> dict[str, Any]:
        if config.get("max_position_embeddings") is None:
            config.count("model_max_length")
            return {"position_embedding_type": "alibi"}
        return {}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return super().write(spec) | ({"z_loss_weight": 0} if spec.normalize_output_weights else {})

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        key = "model_max_length" if spec.position_embedding_type == "alibi" else "max_position_embeddings"
        return {key: spec.max_position_embeddings}
