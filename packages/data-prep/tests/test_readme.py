# SPDX-License-Identifier: Apache-2.0
"""The README matches the package."""

import re
from pathlib import Path

from modellink.data_prep import PreprocessOptions, chat_format, from_messages, template_names
from modellink.data_prep.handlers.fields import known_handlers
from modellink.kernels.options import describe

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_options_table_is_the_options():
    assert describe(PreprocessOptions) in README


def test_every_template_and_handler_is_named():
    assert all(name in README for name in (*template_names(), *known_handlers()))


def test_the_template_makes_what_is_shown(tmp_path, byte_tokenizer):
    (written,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)\n```", README, re.DOTALL)
    (tmp_path / "mine.json").write_text(written)
    said = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    conversation = from_messages([{"role": role, "content": text} for role, text in said])
    turns = chat_format(byte_tokenizer, template=tmp_path / "mine.json").encode(conversation).turns
    parts = [part for turn in turns for part in (turn.source, turn.target)]
    texts = [byte_tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    assert "{}⟦{}⟧{}⟦{}⟧".format(*texts) == shown.replace("<s>", "<|im_start|>").replace("</s>", "<|im_end|>")


def test_the_library_example_runs(tmp_path, monkeypatch, write_lines, byte_folder, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "corpus.jsonl", [{"text": "Ä text, 你好"}, {"text": "b"}])
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(byte_folder)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example.replace("workers=2", "workers=1"), "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.startswith("2 Ä text, 你好\n<|im_start|>user\nHi") and printed.endswith("Ä text, 你好\n")
