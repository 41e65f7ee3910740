# SPDX-License-Identifier: Apache-2.0
"""Command lines of the original's inference.py: every flag is an option, is translated, or is ignored with a
reason."""

from __future__ import annotations

import pytest

from modellink.infer.cli import chat, generate
from modellink.infer.original import translate_original
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.original import original_flags

FLAGS = ("task", "top-p", "top-k", "temperature", "max-length", "max-new-tokens", "hf-chat-template",
         "add-eos-token", "use-kv-cache", "history-turns")


def test_no_flag_is_unknown():
    known = {name for command in (generate, chat) for option in command.params for name in option.opts}
    assert [flag for flag in FLAGS if f"--{flag}" not in known
            and f"--{flag}" not in original_flags("modellink.infer")] == []


def test_a_script_of_the_original(capsys):
    """With the arguments of one of its LLaMA scripts."""
    script = """--use-mcore-models --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --task chat
        --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --position-embedding-type rope
        --normalization RMSNorm --swiglu --seq-length 4096 --max-new-tokens 64 --micro-batch-size 1
        --num-attention-heads 32 --max-position-embeddings 4096 --load CKPT
        --tokenizer-type PretrainedFromHF --tokenizer-name-or-path HF --tokenizer-not-use-fast --bf16
        --use-flash-attn --no-masked-softmax-fusion --attention-softmax-in-fp32
        --exit-on-missing-checkpoint --hf-chat-template --top-k 20"""
    made = translate_original(script.split(), chat)
    values = chat.make_context("chat", made).params
    assert values["dtype"] == "bfloat16" and str(values["load"]) == "CKPT" and values["hf_chat_template"]
    assert int(values["top_k"]) == 20 and int(values["max_new_tokens"]) == 64
    assert int(values["tensor_model_parallel_size"]) == 2
    said = capsys.readouterr().err
    assert "--hidden-size" in next(line for line in said.splitlines()
                                   if line.endswith("the checkpoint describes the model"))
    # one line per reason
    assert len(said.splitlines()) == len({line.rpartition(": ")[2] for line in said.splitlines()})


def test_an_adapter_is_refused():
    with pytest.raises(ModelLinkError, match="--lora-load is not supported"):
        translate_original(["--load", "a", "--lora-load", "b"], generate)


def test_our_own_and_unknown_options_are_kept(capsys):
    # click refuses unknown options
    for args in (["--load", "a", "--tp", "2"], ["--load", "a", "--tmperature=1"]):
        assert translate_original(args, generate) == args
    assert not capsys.readouterr().err
