# SPDX-License-Identifier: Apache-2.0
"""`ModelSpec.layer`: the description of a layer, from the fields of the model and lists of per-layer settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modellink.ckpt_convert.layer import ExpertSpec
from modellink.ckpt_convert.spec import ModelSpec, spec_from
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 36, "num_attention_heads": 6, "num_query_groups": 3, "vocab_size": 91,
                         "kv_channels": 8, "ffn_hidden_size": 52}


def spec(**changes: Any) -> ModelSpec:
    return spec_from(SIZES | changes, "test")


def test_a_window_in_some_layers() -> None:
    assert [layer.window for layer in spec(sliding_window=5).layers] == [5] * 4
    assert [layer.window for layer in spec(sliding_window=5, window_attn_skip_freq=2).layers] == [5, None, 5, None]
    assert [layer.window for layer in spec(layer_windows=(5, 0, 7, 0)).layers] == [5, None, 7, None]


def test_rotary_bases_of_layers() -> None:
    made = spec(layer_rotary_bases=(1e4, 1e6, 0.0, 1e6), rotary_base=1e6, rope_scaling_type="linear", rope_scaling_factor=8.0)
    ropes = [layer.rope for layer in made.layers]
    assert ropes[2] is None and [rope.base for rope in ropes if rope] == [1e4, 1e6, 1e6]
    assert ropes[0] and ropes[0].scaling is None, "only layers with --rotary-base are scaled"
    assert ropes[1] and ropes[1].scaling and ropes[1].scaling.factor == 8.0


def test_experts_in_some_layers() -> None:
    made = spec(num_experts=4, moe_intermediate_size=20, first_k_dense_replace=1, moe_layer_freq=2,
                moe_shared_expert_intermediate_size=12, shared_expert_gate=True)
    assert [(layer.ffn, layer.experts) for layer in made.layers] == [
        (52, None), (52, None), (None, ExpertSpec(4, 20, 12, True)), (52, None)]
    assert "decoder.layers.2.mlp.router.weight" in weights(made) and "decoder.layers.1.mlp.router.weight" not in weights(made)


def test_lists_survive_the_manifest() -> None:
    made = spec(layer_windows=(5, 0, 7, 0), layer_rotary_bases=(1e4, 1e6, 0.0, 1e6))
    assert spec_from(made.to_dict(), "again") == made
    assert replace(made, layer_windows=(5, 0, 7, 1)).differences(made).keys() == {"layer_windows"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"layer_windows": (1, 2)}, "2 windows are given for 4 layers"),
    ({"layer_windows": (1, 2, 3, 4), "sliding_window": 3}, "the window is given twice"),
    ({"layer_rotary_bases": (1.0,)}, "1 rotary bases are given for 4 layers"),
    ({"layer_rotary_bases": (1.0,) * 4, "position_embedding_type": "alibi"}, "but positions are alibi")])
def test_lists_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLinkError, match=message):
        spec(**changes)


def test_the_weights_of_a_spec_are_computed_once() -> None:
    weights.cache_clear()
    assert weights(spec()) is weights(spec())
    assert weights.cache_info().misses == 1
