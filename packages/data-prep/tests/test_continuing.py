# SPDX-License-Identifier: Apache-2.0
"""Conditions of a resumed run: anything that changes a byte of the result makes it start over."""

import datetime
import json

import pytest

from modellink.data_prep import IndexedDataset, PreprocessOptions, Tokenizer, plan, preprocess
from modellink.data_prep.plan import make_plan
from modellink.data_prep.templates import template


@pytest.fixture
def made_from(tmp_path, write_lines, byte_folder):
    path = write_lines(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}])

    def made_from(**options):
        values = {"handler_name": "AlpacaStyleInstructionHandler", "input": (str(path),), "output_prefix": tmp_path / "out",
                  "tokenizer_name_or_path": byte_folder}
        return make_plan(PreprocessOptions(**values | options), show=False).made_from
    return made_from


def test_a_run_that_is_continued_keeps_its_date(tmp_path, write_lines, byte_folder, monkeypatch):
    """A template that prints the date gives the same bytes on both sides of midnight, and for shares."""
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2024, 2, day)

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in byte_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y %H') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    rows = write_lines(tmp_path / "rows.jsonl", [{"instruction": "q" * 600, "output": "a" * 600}] * 4)
    monkeypatch.setattr("modellink.data_prep.plan.date", Day)

    def run(name="set", **more):
        values = {"handler_name": "AlpacaStyleInstructionHandler", "input": (str(rows),), "output_prefix": tmp_path / name,
                  "tokenizer_name_or_path": folder, "hf_chat_template": True, "piece_size": 0.002}
        return preprocess(PreprocessOptions(**values | more), show=False)

    day = 28
    run(piece="0/2")
    day = 29
    assert run().pieces_found_done
    tokenizer, data = Tokenizer.from_folder(folder), IndexedDataset(tmp_path / "set_packed_input_ids_document")
    assert len(data) == 4 and all(tokenizer.decode(ids).startswith("28 Feb 2024 00q") for ids in data)
    run("new")
    assert tokenizer.decode(IndexedDataset(tmp_path / "new_packed_input_ids_document")[3]).startswith("29 Feb")


@pytest.mark.parametrize("option", ["template", "prompt_type"])
def test_the_words_of_a_template_count_however_it_is_named(made_from, tmp_path, option):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"user": ["Q: {content}\n"]}))
    before = made_from(**{option: str(path)})
    assert made_from(**{option: str(path)}) == before
    path.write_text(json.dumps({"user": ["Question: {content}\n"]}))
    after = made_from(**{option: str(path)})
    assert [name for name in before if before[name] != after[name]] == ["wording"]


def test_a_template_of_the_package_may_be_named_either_way(made_from):
    assert made_from(template="qwen")["wording"] == made_from(prompt_type="qwen")["wording"]


def test_data_files_and_the_version_of_the_package_count(made_from, monkeypatch):
    before = made_from(prompt_type="qwen")
    monkeypatch.setattr(plan, "version", lambda package: "9")
    assert made_from(prompt_type="qwen") != before
    monkeypatch.undo()
    changed = template._known()["qwen"] | {"default_system": "Be brief."}
    monkeypatch.setitem(template._known(), "qwen", changed)
    assert made_from(prompt_type="qwen")["wording"] != before["wording"]
