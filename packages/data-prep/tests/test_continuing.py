"""What a run that goes on depends on: whatever changes a byte of the result makes it start anew."""

import json

import pytest

import modellink.data_prep
from modellink.data_prep import PreprocessOptions
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
    monkeypatch.setattr(modellink.data_prep, "__version__", "9")
    assert made_from(prompt_type="qwen") != before
    monkeypatch.undo()
    changed = template._known()["qwen"] | {"default_system": "Be brief."}
    monkeypatch.setitem(template._known(), "qwen", changed)
    assert made_from(prompt_type="qwen")["wording"] != before["wording"]
