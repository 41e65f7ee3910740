# SPDX-License-Identifier: Apache-2.0
"""Every flag of the original's pretraining is an option, is called otherwise, or is answered with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink.core.cli import training_command, translate_original
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.original import original_flags, translate

TABLE = original_flags("modellink.core")
PRETRAIN = training_command("pretrain")
OPTIONS = {name for option in PRETRAIN.params for name in (*option.opts, *option.secondary_opts)}
FLAGS = [line for line in Path(__file__).with_name("original_flags.txt").read_text(encoding="utf-8").split("\n")
         if line.startswith("--")]


def test_no_flag_is_unknown():
    assert [flag for flag in FLAGS if flag not in TABLE and flag not in OPTIONS] == []
    assert set(TABLE) - set(FLAGS) <= {"--calculate-per-token-loss"}  # of a later Megatron
    assert set(TABLE) & OPTIONS == set()


@pytest.mark.parametrize("flag", TABLE)
def test_a_flag_is_answered(flag, capsys):
    about = TABLE[flag]
    value = next(iter(about.get("choices") or about.get("only") or ["65536"]))
    words = [flag, *[value] * min(1, about.get("values", 0)), *about.get("with", [])[:1]]
    if "refused" in about:
        with pytest.raises(ModelLinkError) as caught:
            translate(words, TABLE)
        assert caught.value.fix
        return
    made = translate(words, TABLE)
    assert {word for word in made if word.startswith("--")} <= OPTIONS
    assert ("ignored" in about) == bool(capsys.readouterr().err)


@pytest.mark.parametrize("line", ["--cp-attention-mask-type full", "--qk-layernorm", "--pre-tockens 1024", "--next-tockens 1",
                                  "--sparse-mode 5", "--pre-tockens 4096 --seq-length 8192"])
def test_a_flag_that_changes_the_result_is_never_ignored(line):
    with pytest.raises(ModelLinkError, match="would change the result"):
        translate(line.split(), TABLE)


def test_a_script_of_the_original():
    """The arguments of one of its Gemma2 scripts, in our words."""
    script = """--use-mcore-models --tensor-model-parallel-size 8 --sequence-parallel --num-layers 42 --geglu --post-norm
        --interleave-sliding-window 4096 --add-rmsnorm-offset --tokenizer-type PretrainedFromHF --tokenizer-name-or-path HF
        --no-masked-softmax-fusion --disable-bias-linear --group-query-attention --num-query-groups 8 --no-load-optim
        --no-load-rng --distributed-backend nccl --use-flash-attn --bf16"""
    made = translate(script.split(), TABLE)
    context = PRETRAIN.make_context("pretrain", made)
    assert context.params["activation_func"] == "gelu" and context.params["window_attn_skip_freq"] == "2"
    assert context.params["layernorm_zero_centered_gamma"] and "--use-flash-attn" in made


def parsed(line: str) -> dict[str, object]:
    return PRETRAIN.make_context("pretrain", translate_original(line.split())).params


def test_what_a_line_of_the_original_leaves_unsaid_holds_as_there(capsys):
    """Random weights without a word on the kind of model: GPT-2's; and dropouts."""
    sizes = "--num-layers 2 --hidden-size 64 --num-attention-heads 4"
    params = parsed(f"--use-mcore-models {sizes}")
    assert (params["gated_linear_unit"], params["normalization"], params["add_mlp_bias"]) == (False, "LayerNorm", True)
    assert (params["untie_embeddings_and_output_weights"], params["hidden_dropout"]) == (False, "0.1")
    assert "a command line of the original" in capsys.readouterr().err
    params = parsed(f"--use-mcore-models {sizes} --swiglu --normalization RMSNorm --disable-bias-linear --add-qkv-bias "
                    "--untie-embeddings-and-output-weights --use-rotary-position-embeddings --hidden-dropout 0.0")
    assert (params["gated_linear_unit"], params["activation_func"], params["normalization"]) == (True, "silu", "RMSNorm")
    assert (params["add_qkv_bias"], params["add_mlp_bias"], params["hidden_dropout"]) == (True, False, "0.0")
    assert parsed("--use-mcore-models --load somewhere")["gated_linear_unit"] is None  # the checkpoint says it
    assert parsed(sizes)["gated_linear_unit"] is None  # a line of ours


def test_the_router_of_the_original_wins_in_either_order():
    for line in ("--moe-router-load-balancing-type softmax_topk --moe-aux-loss-coeff 0.001",
                 "--moe-aux-loss-coeff 0.001 --moe-router-load-balancing-type softmax_topk"):
        assert parsed(line)["moe_aux_loss_coeff"] == "0"
    for line in ("--norm-topk-prob --moe-router-load-balancing-type group_limited_greedy",
                 "--moe-router-load-balancing-type group_limited_greedy --norm-topk-prob"):
        assert parsed(line)["moe_router_pre_softmax"] is False


def test_widths_that_follow_from_others_on_the_line():
    params = parsed("--n-shared-experts 2 --moe-intermediate-size 1408 --dim-model-base 256 --hidden-size 2304 "
                    "--input-embeds-norm")
    assert (params["moe_shared_expert_intermediate_size"], params["embedding_multiplier_scale"]) == ("2816", "48")
    assert float(params["output_multiplier_scale"]) == pytest.approx(256 / 2304, rel=1e-15)
    with pytest.raises(ModelLinkError, match="one hidden size"):
        parsed("--n-shared-experts 2")
