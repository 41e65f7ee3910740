# SPDX-License-Identifier: Apache-2.0
"""Command lines of the original's evaluation.py: every flag is an option, translated, or ignored or refused with a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modellink.eval.cli import run_tasks, translate_original
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.original import original_flags

TABLE = original_flags("modellink.eval")
OWN = {name for option in run_tasks.params for name in (*option.opts, *option.secondary_opts)}
FLAGS = ("task-data-path", "temperature", "evaluation-batch-size", "greedy", "top-p", "top-k", "max-new-tokens", "task",
         "instruction-template", "no-chat-template", "use-kv-cache", "hf-chat-template", "eval-language", "max-eval-samples")


def test_no_flag_is_unknown():
    assert [flag for flag in FLAGS if f"--{flag}" not in OWN and f"--{flag}" not in TABLE] == []
    assert set(TABLE) & OWN == set()


def test_a_script_of_the_original(capsys):
    script = """--task-data-path DATA --task mmlu --load CKPT --bf16 --use-kv-cache --greedy --tensor-model-parallel-size 2
        --pipeline-model-parallel-size 4 --evaluation-batch-size 1 --no-chat-template --tokenizer-type PretrainedFromHF
        --output OUT"""
    values = run_tasks.make_context("run", translate_original(script.split())).params
    assert values["dtype"] == "bfloat16" and values["task"] == ("mmlu",) and int(values["tensor_model_parallel_size"]) == 2
    assert int(values["pipeline_model_parallel_size"]) == 4 and "--tokenizer-type" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--top-k", "--instruction-template", "--lora-load"])
def test_what_is_not_done_is_said(flag):
    with pytest.raises(ModelLinkError, match=f"{flag} is not supported") as caught:
        translate_original(["--task", "mmlu", flag, "1"])
    assert caught.value.fix


def test_help_waits_for_no_torch():
    code = ("import sys; from modellink.eval.cli import main\ntry: main()\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "run", "--help"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
