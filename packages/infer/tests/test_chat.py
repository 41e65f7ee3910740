# SPDX-License-Identifier: Apache-2.0
"""The history of a conversation, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from modellink.infer.chat import Conversation, _stream
from modellink.kernels.errors import ModelLinkError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_prompt_has_the_system_message_and_the_last_turns():
    conversation = Conversation("Be kind.", history_turns=2)
    for number in range(4):
        conversation.add(f"q{number}", f"a{number}")
    assert conversation.prompt("now") == [{"role": "system", "content": "Be kind."}, user("q2"),
                                          assistant("a2"), user("q3"),
                                       assistant("a3"), user("now")]


def test_without_history_the_prompt_is_the_message():
    conversation = Conversation(history_turns=0)
    conversation.add("q", "a")
    assert conversation.prompt("now") == [user("now")]


def test_turns_that_do_not_fit_are_dropped_oldest_first(engine):
    conversation = Conversation("Be kind.", history_turns=3)
    for number in range(3):
        conversation.add(f"q{number} " + "long " * 30, "a")
    assert list(_stream(engine, conversation, "now", {"max_new_tokens": 5})) is not None
    assert [message["content"][:2] for message in conversation.messages] == ["q2", "a"]
    before = conversation.messages
    with pytest.raises(ModelLinkError, match="maximum length"):
        _stream(engine, conversation, "long " * 300, {})
    assert conversation.messages == before


def test_an_old_turn_is_dropped_before_an_answer_is_cut_short(engine):
    """The model has 256 positions, and an answer may have 128 tokens."""
    conversation = Conversation(history_turns=3)
    for number in range(3):
        conversation.add(f"q{number} " + "long " * 12, "a")
    stream = _stream(engine, conversation, "now", {"ignore_eos": True})
    assert 0 < len(conversation.messages) < 6
    list(stream)
    assert len(stream.generation.token_ids) == 128


def test_clear_drops_all_turns():
    conversation = Conversation("Be kind.")
    conversation.add("q", "a")
    conversation.clear()
    assert conversation.prompt("now") == [{"role": "system", "content": "Be kind."}, user("now")]


@pytest.mark.parametrize("tp", [1, 2])
def test_ctrl_c_stops_the_answer_but_not_the_program(llama, tp):
    command = [sys.executable, "-m", "modellink.infer.cli", "chat", "--load", str(llama), "--tp", str(tp),
               "--device", "cpu", "--max-new-tokens", "230", "--history-turns", "0", "--temperature", "2",
               "--seed", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    streams: Any = process
    streams.stdin.write(b"hello\n")
    streams.stdin.flush()
    seen = b""
    while b"ModelLink:\n" not in seen:
        more = streams.stdout.read1()
        assert more, streams.stderr.read().decode()
        seen += more
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, to every process of the group
    out, err = process.communicate(b"/quit\n", timeout=60)
    assert process.returncode == 0, err.decode()
    assert (seen + out).endswith(b" (stopped)\n\nYou >> ")  # it prompted for the next line


def test_without_a_template_the_texts_are_joined():
    conversation = Conversation("Be kind. ", 1, use_template=False)
    conversation.add("One? ", "Two. ")
    assert conversation.prompt("Three?") == "Be kind. One? Two. Three?"
