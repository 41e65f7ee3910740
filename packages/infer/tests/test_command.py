# SPDX-License-Identifier: Apache-2.0
"""The commands: what they print, where prompts come from, and one error message per mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

OPTIONS = ("--max-new-tokens", 12, "--device", "cpu")


def run(*args: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "modellink.infer.cli", *map(str, args)], input=stdin,
                          text=True, capture_output=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def test_a_prompt_is_completed(command, llama, engine):
    found = command("generate", "--load", llama, "--prompt", "The quick", *OPTIONS)
    assert (found.status, found.out) == (0, engine.generate("The quick", max_new_tokens=12)[0].text + "\n")
    assert "12 tokens" in found.err


@pytest.mark.parametrize("name", ["prompt.txt", "stdin"])
def test_the_final_newline_of_a_file_or_stdin_is_removed(command, llama, engine, tmp_path, monkeypatch, name):
    expected = engine.generate("Köln\n🦊", max_new_tokens=12)[0].text + "\n"
    if name == "stdin":
        monkeypatch.setattr(sys, "stdin", io.StringIO("Köln\n🦊\n"))
        assert command("generate", "--load", llama, *OPTIONS).out == expected
    else:
        (tmp_path / name).write_text("Köln\n🦊\n")
        assert command("generate", "--load", llama, "--prompt-file", tmp_path / name,
                       *OPTIONS).out == expected


def test_several_prompts_as_json(command, llama, engine, prompts):
    found = command("generate", "--load", llama, "--json", *OPTIONS, "--prompt", *prompts)
    lines = [json.loads(line) for line in found.out.splitlines()]
    expected = engine.generate(prompts, max_new_tokens=12)
    assert [line["prompt"] for line in lines] == prompts
    assert [(line["text"], line["token_ids"], line["finish_reason"]) for line in lines] == [
        (completion.text, completion.token_ids, completion.finish_reason) for completion in expected]


def test_completions_are_printed_in_order_as_soon_as_possible(command, llama, engine, monkeypatch, tmp_path):
    """The first ones are printed although a later one fails."""
    from modellink.infer.batch import ContinuousBatch
    (tmp_path / "many.jsonl").write_text("".join(f'"The {number}"\n' for number in range(4)))
    step, steps = ContinuousBatch.step, []

    def fails(batch):
        steps.append(1)
        if len(steps) == 30:
            raise RuntimeError("no more")
        return step(batch)
    monkeypatch.setattr(ContinuousBatch, "step", fails)
    found = command("generate", "--load", llama, "--prompt-file", tmp_path / "many.jsonl", "--json",
                    "--batch-size", 1, *OPTIONS)
    monkeypatch.undo()
    expected = [engine.generate(f"The {number}", max_new_tokens=12)[0].text for number in range(2)]
    assert found.status == 1 and [json.loads(line)["text"] for line in found.out.splitlines()] == expected


def test_log_probabilities_as_json(command, llama, engine):
    found = command("generate", "--load", llama, "--json", "--logprobs", "--prompt", "The quick", *OPTIONS)
    (expected,) = engine.generate("The quick", max_new_tokens=12, logprobs=True)
    assert json.loads(found.out)["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    assert "generating: 2 of 2 completions" in command("generate", "--load", llama, "--prompt", "a", "b",
                                                       *OPTIONS).err


def test_a_chat_turn(command, llama, engine):
    found = command("generate", "--load", llama, "--chat", "--system", "Be kind.", "--prompt", "Hello",
                    "--stream", *OPTIONS)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert found.out == engine.generate(chat, max_new_tokens=12)[0].text + "\n"


def test_a_file_of_many_prompts(command, llama, engine, tmp_path):
    chat = [{"role": "user", "content": "Hello"}]
    (tmp_path / "many.jsonl").write_text(f'"The"\n{{"prompt": "A"}}\n\n{json.dumps({"messages": chat})}\n')
    found = command("generate", "--load", llama, "--json", "--prompt-file", tmp_path / "many.jsonl", *OPTIONS)
    texts = [json.loads(line)["text"] for line in found.out.splitlines()]
    assert texts == [engine.generate(prompt, max_new_tokens=12)[0].text for prompt in ("The", "A", chat)]


def test_only_newlines_separate_prompts(tmp_path):
    """JSON strings may contain other line separators."""
    from modellink.infer.prompt_input import read_prompt_file
    texts = ["a\u2028b\u2029c\x85d", "e\x7ff"]
    for end in ("\n", "\r\n"):
        (tmp_path / "many.jsonl").write_bytes("".join(json.dumps(text, ensure_ascii=False) + end
                                                      for text in texts).encode())
        assert read_prompt_file(tmp_path / "many.jsonl") == texts


def test_sampling_uses_the_defaults_of_the_command(command, llama, engine):
    found = command("generate", "--load", llama, "--prompt", "The", "--do-sample", "--seed", 4, *OPTIONS)
    expected = engine.generate("The", max_new_tokens=12, do_sample=True, temperature=0.7, top_k=50,
                               top_p=0.95, seed=4)
    assert found.out == expected[0].text + "\n"


def test_stop_strings(command, llama, engine):
    text = engine.generate("The quick", max_new_tokens=12)[0].text
    found = command("generate", "--load", llama, "--prompt", "The quick", "--stop", text[5:8], *OPTIONS)
    assert found.out == text[:text.index(text[5:8])] + "\n"


def test_two_ranks_read_one_stdin_and_print_once(llama, engine):
    found = run("generate", "--load", llama, "--tp", 2, "--stream", *OPTIONS, stdin="Köln: 机器\n")
    expected = engine.generate("Köln: 机器", max_new_tokens=12)[0].text
    assert (found.returncode, found.stdout) == (0, expected + "\n"), found.stderr


def test_a_conversation_on_two_ranks(llama, engine):
    found = run("chat", "--load", llama, "--tp", 2, "--no-do-sample", "--history-turns", 1, *OPTIONS,
                stdin="one\ntwo\n\nthree\n/clear\nfour\n/quit\nnever\n")
    assert found.returncode == 0, found.stderr
    messages, expected = [], []
    for text in ("one", "two", "three", "four"):
        messages = messages[-2:] if text != "four" else []
        messages.append({"role": "user", "content": text})
        expected.append(engine.generate(messages, max_new_tokens=12)[0].text)
        messages.append({"role": "assistant", "content": expected[-1]})
    assert found.stdout.replace("You >> ", "") == "".join(f"ModelLink:\n{text}\n\n" for text in expected)
    assert "/clear: the conversation is cleared" in found.stderr
    assert "/quit: the conversation ends" in found.stderr


WRONG = [
    (["--load", "nowhere", "--prompt", "a"], "checkpoint folder is missing"),
    (["--load", "LLAMA", "--prompt", "a", "--ckpt-step", "3"], "no iterations"),
    (["--prompt", "a"], "--load is required"),
    (["--load", "LLAMA"], "there is no prompt"),
    (["--load", "LLAMA", "--prompt", ""], "there is no prompt"),
    (["--load", "LLAMA", "--prompt", "a", "--prompt-file", "b"], "not both"),
    (["--load", "LLAMA", "--prompt-file", "nowhere.txt"], "cannot be read"),
    (["--load", "LLAMA", "--prompt", "a", "--tp", "3"], "does not divide the 2 query groups"),
    (["--load", "LLAMA", "--prompt", "a", "--pp", "2"], "3 layers cannot be split evenly"),
    (["--load", "LLAMA", "--prompt", "a", "--tp", "0"], "must be at least 1"),
    (["--load", "LLAMA", "--prompt", "a", "--max-new-tokens", "0"], "must be at least 1"),
    (["--load", "LLAMA", "--prompt", "a", "--max-new-tokens", "400"], "use at most 255"),
    (["--load", "LLAMA", "--prompt", "a " * 400], "maximum length is 256"),
    (["--load", "LLAMA", "--prompt", "a", "--temperature", "nan"], "must be at least 0"),
    (["--load", "LLAMA", "--prompt", "a", "--temperature", "warm"], "must be a number"),
    (["--load", "LLAMA", "--prompt", "a", "--seed", "1"], "add --do-sample"),
    (["--load", "LLAMA", "--prompt", "a", "--no-do-sample", "--top-k", "3"],
     "--top-k has no effect without sampling"),
    (["--load", "LLAMA", "--prompt", "a", "--system", "b"], "add --chat"),
    (["--load", "LLAMA", "--prompt", "a", "--stream", "--json"], "not both"),
    (["--load", "LLAMA", "--prompt", "a", "--logprobs"], "add --json"),
    (["--load", "LLAMA", "--prompt", "a", "--nonsense"], "unknown option"),
    (["--load", "LLAMA", "--prompt", "a", "--device", "abacus"], "abacus"),
    (["--load", "LLAMA", "--prompt", "a", "--model-type-hf", "nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_mistake_gets_one_error_message(command, llama, monkeypatch, args, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    found = command("generate", *(str(llama) if arg == "LLAMA" else arg for arg in args))
    assert (found.status, found.out) == (2, "")
    assert message in found.err and "Traceback" not in found.err
    assert found.err.lower().count("error:") == 1


@pytest.mark.parametrize(("line", "message"), [("{", "line 2"), ("3", "line 2"), ('{"text": "a"}', "line 2")])
def test_a_wrong_line_of_a_prompt_file_is_named(command, llama, tmp_path, line, message):
    (tmp_path / "many.jsonl").write_text(f'"The"\n{line}\n')
    found = command("generate", "--load", llama, "--prompt-file", tmp_path / "many.jsonl")
    assert found.status == 2 and message in found.err


TORCH_FREE = [
    ("--help", 0), ("generate --help", 0), ("chat --help", 0), ("serve --help", 0),
    ("generate --load x --prompt a --device abacus", 2), ("generate --load x --tp many", 2),
    ("generate --load x --prompt a --temperature 20000", 2), ("generate --prompt a", 2),
    ("generate --load x --prompt a --do-sample --repetition-penalty 0", 2),
    ("generate --load x --prompt a --num-beams 2 --num-return-sequences 3", 2),
    ("generate --load x --prompt a --json-schema {} --regex a", 2),
    ("generate --load x --prompt a --stream --num-beams 2", 2),
    ("generate --load x --prompt-file nowhere", 2),
    ("chat --load x --int8 --no-native", 2), ("serve --load x --port 0", 2),
    ("serve --replica-url http://a:1 --load x", 2), ("generate --load x --prompt a --unknown", 2)]
RUN_ALL = """
import sys
from modellink.infer import cli
for line in sys.stdin:
    sys.argv = ["modellink-infer", *line.split()]
    try:
        cli.main()
    except SystemExit as leaving:
        print("status", leaving.code, [name for name in ("torch", "megatron.core") if name in sys.modules])
"""


def test_help_and_mistakes_in_options_import_no_torch():
    """In one process: what one command line imported would be there for the next ones."""
    done = subprocess.run([sys.executable, "-c", RUN_ALL], input="\n".join(line for line, _ in TORCH_FREE),
                          capture_output=True, text=True, timeout=120)
    found = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert found == [f"status {status} []" for _, status in TORCH_FREE], done.stderr


def test_a_layout_that_does_not_fit_is_found_before_megatron_is_imported(llama):
    done = subprocess.run([sys.executable, "-c", RUN_ALL], input=f"generate --load {llama} --prompt a --tp 3",
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "status 2 ['torch']", done.stderr
