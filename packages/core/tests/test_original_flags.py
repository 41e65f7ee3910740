"""Every flag of the original's pretraining is an option, is called otherwise, or is answered with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink.core.cli import pretrain
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.original import original_flags, translate

TABLE = original_flags("modellink.core")
OPTIONS = {name for option in pretrain.params for name in (*option.opts, *option.secondary_opts)}
FLAGS = [line for line in Path(__file__).with_name("original_flags.txt").read_text(encoding="utf-8").split("\n")
         if line.startswith("--")]


def test_no_flag_is_unknown():
    assert [flag for flag in FLAGS if flag not in TABLE and flag not in OPTIONS] == []
    assert set(TABLE) - set(FLAGS) <= {"--use-checkpoint-opt-param-scheduler", "--override-opt-param-scheduler"}
    assert set(TABLE) & OPTIONS == set()


@pytest.mark.parametrize("flag", TABLE)
def test_a_flag_is_answered(flag, capsys):
    about = TABLE[flag]
    value = next(iter(about["choices"])) if "choices" in about else "1"
    words = [flag, *[value] * min(1, about.get("values", 0))]
    if "refused" in about:
        with pytest.raises(ModelLinkError) as caught:
            translate(words, TABLE)
        assert caught.value.fix
        return
    made = translate(words, TABLE)
    assert {word for word in made if word.startswith("--")} <= OPTIONS
    assert ("ignored" in about) == bool(capsys.readouterr().err)


def test_a_script_of_the_original():
    """The arguments of one of its Gemma2 scripts, in our words."""
    script = """--use-mcore-models --tensor-model-parallel-size 8 --sequence-parallel --num-layers 42 --geglu --post-norm
        --interleave-sliding-window 4096 --add-rmsnorm-offset --tokenizer-type PretrainedFromHF --tokenizer-name-or-path HF
        --no-masked-softmax-fusion --disable-bias-linear --group-query-attention --num-query-groups 8 --no-load-optim
        --no-load-rng --distributed-backend nccl --use-flash-attn --bf16"""
    made = translate(script.split(), TABLE)
    context = pretrain.make_context("pretrain", made)
    assert context.params["activation_func"] == "gelu" and context.params["window_attn_skip_freq"] == "2"
    assert context.params["layernorm_zero_centered_gamma"] and "--use-flash-attn" in made
