# SPDX-License-Identifier: Apache-2.0
"""Instruction and pairwise sets: the samples of each row style, the learned tokens, and the handling of long samples."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from modellink.data_prep import IndexedDataset, PreprocessOptions, Tokenizer, preprocess
from modellink.data_prep.handlers.fields import known_handlers
from modellink.data_prep.templates.encoded import Encoded, Turn, share
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.errors import ModelLinkError

FIELDS = ("input_ids", "attention_mask", "labels")
PAIRS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2"}
CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
RANKED = {"conversations": CHAT[:1], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}


@pytest.fixture
def make(tmp_path, write_lines, byte_folder):
    """Preprocess rows; returns the fields by name and the summary."""
    def make(rows, handler, name="set", show=False, **options):
        path = rows if isinstance(rows, str) else str(write_lines(tmp_path / f"{name}.jsonl", rows))
        given = {"prompt_type": "qwen"} | options
        summary = preprocess(PreprocessOptions(
            input=(path,), output_prefix=tmp_path / "out" / name, tokenizer_name_or_path=byte_folder, handler_name=handler,
            **given), show=show)
        return {output.removeprefix("packed_"): IndexedDataset(prefix) for output, prefix in summary.outputs.items()}, summary
    return make


def said(tokenizer: Tokenizer, data, index=0, ids="input_ids", labels="labels") -> list[str]:
    """Return the learned spans of a sample as texts; all other labels are -100."""
    found, row, marks = [[]], data[ids][index], data[labels][index]
    for token, label in zip(row.tolist(), marks.tolist(), strict=True):
        assert label in (token, IGNORE_INDEX)
        if label == IGNORE_INDEX:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(part, skip_special_tokens=False) for part in found if part]


def text(tokenizer, data, index=0, ids="input_ids") -> str:
    return tokenizer.decode(data[ids][index], skip_special_tokens=False)


def test_alpaca_rows(make, byte_tokenizer, tmp_path):
    rows = [ALPACA, {"instruction": "Say", "output": "ok", "input": "", "history": [["a", "b"], ["c", "d"]], "system": "S"}]
    data, summary = make(rows, "AlpacaStyleInstructionHandler")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"set_packed_{field}_document.{ending}" for field in sorted(FIELDS) for ending in ("bin", "idx")]
    assert all(data[field].dtype == np.int32 and data[field].document_count == 2 for field in FIELDS)
    assert text(byte_tokenizer, data) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAdd.\n1 1<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>")
    assert said(byte_tokenizer, data) == ["2<|im_end|>"]
    assert text(byte_tokenizer, data, 1).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
    assert said(byte_tokenizer, data, 1) == ["b<|im_end|>", "d<|im_end|>", "ok<|im_end|>"]
    assert all(set(mask.tolist()) == {1} for mask in data["attention_mask"])
    assert summary.learned_tokens == sum((labels != IGNORE_INDEX).sum() for labels in data["labels"])


def test_columns_under_other_names(make, byte_tokenizer):
    rows = [{"q": "Add.", "a": "2", "input": "not read", "system": "not read"}]
    data, _ = make(rows, "AlpacaStyleInstructionHandler",
                   map_keys='{"prompt": "q", "query": "", "response": "a", "system": ""}')
    assert "not read" not in text(byte_tokenizer, data) and said(byte_tokenizer, data) == ["2<|im_end|>"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_an_optional_column_may_come_late_where_rows_differ(make, byte_tokenizer, tmp_path, capsys, kind):
    rows = [*[ALPACA] * 120, ALPACA | {"sys": "S", "earlier": [["a", "b"]]}]
    (tmp_path / f"late.{kind}").write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    data, _ = make(str(tmp_path / f"late.{kind}"), "AlpacaStyleInstructionHandler", show=True,
                   map_keys='{"system": "sys", "history": "earlier"}')
    assert text(byte_tokenizer, data, 120).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na")
    assert "has no column 'sys' in its first rows" in capsys.readouterr().err


def test_an_optional_column_that_is_named_must_be_in_a_header(make, tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nq,a\n")
    assert make(str(tmp_path / "a.csv"), "AlpacaStyleInstructionHandler")[1].rows == 1
    with pytest.raises(ModelLinkError, match="no column 'sys'"):
        make(str(tmp_path / "a.csv"), "AlpacaStyleInstructionHandler", name="b", map_keys='{"system": "sys"}')


def test_sharegpt_rows_with_tools(make, byte_tokenizer):
    row = {"system": "S", "tools": json.dumps([{"name": "add", "parameters": {"properties": {}}}]), "conversations": [
        {"from": "human", "value": "1+1"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two"}]}
    data, _ = make([row], "SharegptStyleInstructionHandler")
    whole = text(byte_tokenizer, data)
    assert "<|im_start|>system\nSYou have access to the following tools:\n> Tool Name: add\n" in whole
    assert "<|im_start|>tool\n2<|im_end|>\n" in whole
    assert said(byte_tokenizer, data) == ['Action: add\nAction Input: {"a": 1}<|im_end|>', "Two<|im_end|>"]


def test_partial_tags_keep_the_other_defaults(make, byte_tokenizer):
    rows = [{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Yo"}]}]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    data, _ = make(rows, "SharegptStyleInstructionHandler", map_keys=json.dumps({"messages": "messages", "tags": tags}))
    assert text(byte_tokenizer, data).startswith("<|im_start|>system\nS<|im_end|>\n")
    assert said(byte_tokenizer, data) == ["Yo<|im_end|>"]


@pytest.mark.parametrize(("row", "handler"), [
    (RANKED, "SharegptStylePairwiseHandler"),
    ({"instruction": "Hi", "chosen": "good", "rejected": "bad"}, "AlpacaStylePairwiseHandler"),
    ({"instruction": "Hi", "chosen": ["good"], "rejected": ["bad"]}, "AlpacaStylePairwiseHandler")])
def test_pairs(make, byte_tokenizer, row, handler):
    data, _ = make([row], handler)
    assert tuple(data) == PAIRS
    for which, answer in (("chosen", "good"), ("rejected", "bad")):
        names = {"ids": f"{which}_input_ids", "labels": f"{which}_labels"}
        assert said(byte_tokenizer, data, **names) == [f"{answer}<|im_end|>"]
        whole = text(byte_tokenizer, data, ids=names["ids"])
        assert whole.endswith(f"user\nHi<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")


def test_both_answers_in_one_column(make, byte_tokenizer):
    data, _ = make([{"instruction": "Hi", "output": ["good", "bad"]}], "AlpacaStylePairwiseHandler",
                   map_keys='{"chosen": "output", "rejected": "output"}')
    assert "good" in text(byte_tokenizer, data, ids="chosen_input_ids")
    assert "bad" in text(byte_tokenizer, data, ids="rejected_input_ids")


def test_datasets_by_name(make, byte_tokenizer, tmp_path, write_lines):
    write_lines(tmp_path / "a.jsonl", [{"q": "Add.", "output": "2"}])
    (tmp_path / "b.json").write_text(json.dumps([{"chat": CHAT}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "first": {"file_name": "a.jsonl", "columns": {"prompt": "q"}}, "ranked": {"file_name": "r.json", "ranking": True},
        "second": {"file_name": "b.json", "formatting": "sharegpt", "columns": {"messages": "chat"}},
        "away": {"file_name": "../a.jsonl"}, "hub": {"hf_hub_url": "x/y"},
        "some": {"file_name": "a.jsonl", "num_samples": 5}, "part": {"file_name": "a.jsonl", "subset": "en"}}))
    data, _ = make("first,second", "LlamaFactoryInstructionHandler", dataset_dir=tmp_path)
    assert [said(byte_tokenizer, data, index) for index in (0, 1)] == [["2<|im_end|>"], ["Yo<|im_end|>"]]
    for names, message in (("frist", "unknown dataset 'frist'"), ("away", "outside the folder"), ("hub", "no file_name"),
                           ("some", "num_samples is 5"), ("part", "subset is 'en'")):
        with pytest.raises(ModelLinkError, match=message):
            make(names, "LlamaFactoryInstructionHandler", dataset_dir=tmp_path, name="other")


def test_a_dataset_may_be_a_folder_or_a_pattern(make, byte_tokenizer, tmp_path, write_lines):
    (tmp_path / "many").mkdir()
    for name in "ab":
        write_lines(tmp_path / "many" / f"{name}.jsonl", [{"instruction": "q", "output": name}])
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "folder": {"file_name": "many"}, "pattern": {"file_name": "many/[b-z]*.jsonl", "split": "train"}}))
    for names, answers in (("folder", ["a", "b"]), ("pattern", ["b"])):
        data, _ = make(names, "LlamaFactoryInstructionHandler", name=names, dataset_dir=tmp_path)
        assert [said(byte_tokenizer, data, index) for index in range(len(answers))] == [[f"{one}<|im_end|>"] for one in answers]


TOOL = [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}, {"from": "observation", "value": ""}]
EMPTY = {
    "no answer": ("AlpacaStyleInstructionHandler", ALPACA | {"output": ""}, ALPACA),
    "white space": ("AlpacaStyleInstructionHandler", ALPACA | {"output": " \n"}, ALPACA),
    "no question": ("AlpacaStyleInstructionHandler", ALPACA | {"instruction": "", "input": ""}, ALPACA | {"instruction": ""}),
    "an earlier turn": ("SharegptStyleInstructionHandler",
                        {"conversations": [CHAT[0], CHAT[1] | {"value": ""}, *CHAT]}, {"conversations": CHAT}),
    "what a tool gave": ("SharegptStyleInstructionHandler", {"conversations": [CHAT[0], CHAT[1] | {"value": ""}]},
                         {"conversations": [CHAT[0], *TOOL, CHAT[1]]}),
    "a whole conversation in a text": ("BelleMultiTurnInstructionHandler", {"instruction": "Human: a\nAssistant:", "output": ""},
                                       {"instruction": "Human: a\nAssistant:", "output": "b"}),
    "turns by name": ("MOSSMultiTurnHandler", {"chat": {"turn_1": {"Human": "a", "MOSS": "<|MOSS|>: <eom>"}}},
                      {"chat": {"turn_1": {"Human": "a", "MOSS": "b"}}}),
    # a template whose answers have no end of their own would learn the answer of an earlier turn instead
    "chosen": ("SharegptStylePairwiseHandler", RANKED | {"chosen": CHAT[1] | {"value": " "}}, RANKED),
    "rejected": ("SharegptStylePairwiseHandler", RANKED | {"rejected": CHAT[1] | {"value": ""}}, RANKED)}


@pytest.mark.parametrize("name", EMPTY)
def test_samples_with_an_empty_question_or_answer_are_left_out_and_counted(make, name):
    handler, empty, good = EMPTY[name]
    data, summary = make([empty, good, empty], handler)
    assert (summary.rows, summary.empty_samples, summary.skipped_rows) == (3, 2, 0)
    assert all(len(field) == 1 for field in data.values())
    with pytest.raises(ModelLinkError, match="has no tokens") as caught:
        make([empty], handler, name="none")
    assert caught.value.fix == "samples with an empty question or answer: 1"


OLDER = {
    "GeneralInstructionHandler": (ALPACA, "### Instruction:\nAdd.\n1 1\n\n### Response:\n", ["2<|im_end|>"]),
    "LeetcodePythonInstructionHandler": (
        {"code_with_problem": "Sort it. ```python\n```", "code_only": "x.sort()", "explanation_only": "Sorts."},
        "### Instruction:\nSort it.\n\n### Response:\n", ["x.sort()\nSorts.<|im_end|>"]),
    "BelleMultiTurnInstructionHandler": (
        {"instruction": "Human: a\nAssistant: b\nHuman: c\nAssistant:", "output": "d"},
        "### Instruction:\nc\n\n### Response:\n", ["b<|im_end|>", "d<|im_end|>"]),
    "MOSSInstructionHandler": (
        {"chat": {"turn_1": {"Human": "<|Human|>: a<eoh>\n", "MOSS": "<|MOSS|>: b<eom>\n"}, "turn_2": None}},
        "### Instruction:\na\n\n### Response:\n", ["b<|im_end|>"]),
    "MOSSMultiTurnHandler": (
        {"chat": {"turn_1": {"Human": "a", "MOSS": "b"}, "turn_2": {"Human": "c", "MOSS": "d"}}},
        "### Instruction:\nc\n\n### Response:\n", ["b<|im_end|>", "d<|im_end|>"])}


@pytest.mark.parametrize("handler", OLDER)
def test_older_handlers(make, byte_tokenizer, handler):
    row, asked, answers = OLDER[handler]
    data, _ = make([row], handler, prompt_type=None)
    assert asked in text(byte_tokenizer, data) and said(byte_tokenizer, data) == answers


@pytest.mark.parametrize(("handler", "row", "expected"), [
    ("AlpacaPretrainHandler", ALPACA, "request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response: ASSISTANT: 2"),
    ("AlpacaPretrainHandler", ALPACA | {"input": ""}, "### Instruction:\nAdd.\n\n### Response: ASSISTANT: 2"),
    ("StackOverflowPythonPretrainHandler", {"title": "t", "question_body": "q", "answer_body": "{title}"},
     "In python, t\n### Question:\nq\n### Response:\n{title}\n")])
def test_texts_made_of_columns(make, byte_tokenizer, handler, row, expected):
    data, _ = make([row], handler, prompt_type=None)
    assert list(data) == ["text"] and text(byte_tokenizer, data, ids="text").endswith(expected)


def test_every_handler_has_a_test():
    tested = {"AlpacaStyleInstructionHandler", "SharegptStyleInstructionHandler", "LlamaFactoryInstructionHandler",
              "AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler", "GeneralPretrainHandler", "AlpacaPretrainHandler",
              "StackOverflowPythonPretrainHandler", *OLDER}
    assert tested == set(known_handlers())


def test_an_unknown_handler_lists_them(make):
    with pytest.raises(ModelLinkError, match="unknown handler 'AlpacaHandler'") as caught:
        make([ALPACA], "AlpacaHandler")
    assert all(name in str(caught.value.fix) for name in known_handlers())


def test_train_on_prompt_and_append_eod(make, byte_tokenizer):
    data, _ = make([ALPACA], "AlpacaStyleInstructionHandler", train_on_prompt=True)
    assert (data["labels"][0] == data["input_ids"][0]).all()
    data, _ = make([ALPACA], "AlpacaStyleInstructionHandler", name="eod", append_eod=True)
    assert said(byte_tokenizer, data) == ["2<|im_end|><|im_end|>"]


def test_an_efficient_template_learns_the_end_where_the_next_turn_begins(make, byte_tokenizer, tmp_path):
    (tmp_path / "mine.json").write_text('{"user": ["Q:{content} A:"], "separator": ["\\n"], "efficient_eos": true}')
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    data, _ = make([row], "AlpacaStyleInstructionHandler", prompt_type=None, template=tmp_path / "mine.json")
    ids, labels = data["input_ids"][0].tolist(), data["labels"][0].tolist()
    separator, *_ = byte_tokenizer.encode("\n")
    assert ids[-1] == labels[-1] == 2 and labels[ids.index(separator)] == 2
    learned = [token for token in labels if token != IGNORE_INDEX]
    assert learned == [*byte_tokenizer.encode("b"), 2, *byte_tokenizer.encode("d"), 2]


@pytest.mark.parametrize(("source", "target", "room", "kept"), [
    (100, 10, 50, (40, 10)), (10, 100, 50, (10, 40)), (100, 100, 50, (25, 25)), (300, 100, 100, (75, 25)), (0, 9, 4, (0, 4))])
def test_the_share_of_a_long_turn(source, target, room, kept):
    assert share(source, target, room) == kept


def test_a_long_conversation_is_cut_from_its_end_and_keeps_answers():
    turns = [Turn([1] * 30, [2] * 30), Turn([3] * 30, [4] * 30), Turn([5] * 9, [6] * 9)]
    fitted = Encoded(turns, [7]).fit(80)
    assert [(len(turn.source), len(turn.target)) for turn in fitted.turns] == [(30, 30), (10, 9)]
    assert len(fitted) == 80 and fitted.ids[-1] == 7 and fitted.labels().count(4) == 9
    assert Encoded(turns, [7]).fit(200) == Encoded(turns, [7])


def test_no_end_is_learned_after_an_answer_that_was_cut():
    """Neither the closing end token nor the one learned at the next turn; after complete answers both are learned."""
    turns = [Turn([1] * 4, [2] * 60), Turn([3] * 4, [4] * 4, closing=7)]
    cut = Encoded(turns, [7]).fit(60)
    assert cut.ids[-1] == 7 and 7 not in cut.labels() and 7 not in cut.labels(train_on_prompt=True)
    both = Encoded([Turn([1] * 40, [2] * 4), Turn([3] * 40, [4] * 4, closing=7)], [7]).fit(60)
    assert both.labels()[-1] == 7 and both.labels().count(7) == 2
    first = Encoded([Turn([1] * 30, [2] * 40), Turn([3] * 9, [4] * 9, closing=7)], []).fit(80)
    assert first.labels().count(7) == 1  # the first answer is complete
    shared = Encoded([Turn([1] * 100, [2] * 100), Turn([3] * 9, [4] * 9, closing=7)], [7])
    assert 7 not in shared.fit(100).labels()


@pytest.mark.parametrize(("choice", "counts"), [("cut", (3, 2, 0)), ("drop", (1, 0, 2))])
def test_long_samples_are_counted(make, choice, counts):
    rows = [ALPACA, ALPACA | {"output": "long " * 400}, ALPACA | {"instruction": "long " * 400}]
    data, summary = make(rows, "AlpacaStyleInstructionHandler", seq_length=100, long_samples=choice)
    assert (summary.documents["packed_labels"], summary.cut_samples, summary.dropped_samples) == counts
    assert all(len(ids) <= 100 and (labels != IGNORE_INDEX).any()
               for ids, labels in zip(data["input_ids"], data["labels"], strict=True))


@pytest.mark.parametrize(("choice", "counts"), [("cut", (3, 2, 0)), ("drop", (1, 0, 2))])
def test_long_pairs_are_counted(make, choice, counts):
    rows = [RANKED, RANKED | {"chosen": {"from": "gpt", "value": "long " * 400}},
            RANKED | {"conversations": [{"from": "human", "value": "long " * 400}]}]
    data, summary = make(rows, "SharegptStylePairwiseHandler", seq_length=100, long_samples=choice)
    assert (summary.documents["packed_chosen_labels"], summary.cut_samples, summary.dropped_samples) == counts
    assert all(len(ids) <= 100 for name in PAIRS for ids in data[name])
    assert all((labels != IGNORE_INDEX).any() for labels in data["rejected_labels"])


def test_all_samples_too_long(make):
    with pytest.raises(ModelLinkError, match="has no tokens") as caught:
        make([ALPACA | {"output": "long " * 99}], "AlpacaStyleInstructionHandler", seq_length=20, long_samples="drop")
    assert "longer than --seq-length" in str(caught.value.fix)


REAL = {"alpaca_en_demo": ("AlpacaStyleInstructionHandler", FIELDS), "alpaca_zh_demo": ("AlpacaStyleInstructionHandler", FIELDS),
        "glaive_toolcall_en_demo": ("SharegptStyleInstructionHandler", FIELDS),
        "dpo_en_demo": ("SharegptStylePairwiseHandler", PAIRS), "dpo_zh_demo": ("SharegptStylePairwiseHandler", PAIRS)}


@pytest.mark.parametrize("name", REAL)
def test_real_sets(make, real_text, byte_tokenizer, name):
    path = real_text.parent / "sft" / f"{name}.json"
    handler, fields = REAL[name]
    data, summary = make(str(path), handler, on_bad_row="skip")
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert tuple(data) == fields and summary.rows + summary.skipped_rows == len(rows) and summary.skipped_rows < len(rows) / 50
    ids, labels = fields[0], fields[-1 if len(fields) == 3 else 1]
    assert len(data[ids]) == summary.rows
    first = rows[0]
    answer = first.get("output") or (first["chosen"] if "chosen" in first else first["conversations"][-1])["value"]
    assert said(byte_tokenizer, data, ids=ids, labels=labels)[-1] == answer + "<|im_end|>"


def test_inspect_shows_what_is_learned(make, command, byte_folder, tmp_path):
    make([ALPACA, ALPACA | {"output": "word " * 40}], "AlpacaStyleInstructionHandler")
    seen = command("inspect", "out/set", "--tokenizer-name-or-path", byte_folder, "--histogram", "lengths.svg", "--shown", "200",
                   "--summary", "seen.json")
    found = json.loads((tmp_path / "seen.json").read_text())
    assert seen.returncode == 0, seen.stderr
    assert "assistant\\n⟦2<|im_end|>⟧" in found["samples"]["0"] and found["documents"] == 2
    assert 0 < found["learned"] < found["tokens"] and "learned tokens" in seen.stdout
    bars = [rect for rect in ElementTree.parse(tmp_path / "lengths.svg").iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert sum(int(rect[0].text.rsplit(": ")[-1].replace(",", "")) for rect in bars) == 2
    (tmp_path / "out" / "set_packed_labels_document.idx").unlink()
    assert command("inspect", "out/set_packed_input_ids_document.bin").returncode == 0
    assert command("inspect", "out/absent").returncode == 2
