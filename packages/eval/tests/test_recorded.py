# SPDX-License-Identifier: Apache-2.0
"""Prompts use the chat template a checkpoint was trained with, unless options choose another."""

import json

import pytest

from modellink.eval.options import RunOptions
from modellink.eval.recorded import recorded_chat


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "tuned"
    (folder / "iter_0000002").mkdir(parents=True)
    (folder / "modellink.json").write_text(json.dumps({"prompt_type": "qwen"}))
    return folder


def chat(checkpoint, tmp_path, **more):
    options = RunOptions(task=("mmlu",), task_data_path=(tmp_path,), output=tmp_path / "out", load=checkpoint, **more)
    return options.settings().chat


def test_it_is_taken_where_nothing_is_said(checkpoint, tmp_path):
    assert chat(checkpoint, tmp_path) == chat(checkpoint / "iter_0000002", tmp_path) == "qwen"
    assert chat(tmp_path, tmp_path) is None
    (checkpoint / "modellink.json").write_text(json.dumps({"prompt_type": None}))
    assert chat(checkpoint, tmp_path) is None


def test_what_is_said_comes_first(checkpoint, tmp_path):
    assert chat(checkpoint, tmp_path, no_chat_template=True) is None
    assert chat(checkpoint, tmp_path, prompt_type="llama3") == "llama3"
    assert chat(checkpoint, tmp_path, hf_chat_template=True) == "hf-chat-template"


def test_the_name_is_that_of_the_converter(tmp_path):
    manifest = pytest.importorskip("modellink.ckpt_convert.manifest")
    from modellink.eval import recorded
    assert recorded.MANIFEST == manifest.FILE and recorded_chat(tmp_path) is None


def test_the_command_says_which_one_it_takes(command, data, checkpoint, tmp_path):
    pytest.importorskip("modellink.infer")
    words = ("run", "--task", "mmlu", "--task-data-path", "data", "--load", checkpoint, "--output", "out")
    assert "the chat template qwen, with which the checkpoint was trained" in command(*words).stderr
    assert "in the template" not in command(*words, "--no-chat-template").stderr
