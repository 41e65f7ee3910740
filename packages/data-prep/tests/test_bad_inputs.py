# SPDX-License-Identifier: Apache-2.0
"""Bad inputs: each is refused with one message that names file, row and fix, and leaves no files behind."""

import gzip
import io
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from modellink.data_prep import PreprocessOptions, preprocess
from modellink.kernels.errors import ModelLinkError


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def parquet(column):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


def arrow(rows, chunk=2):
    table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return file.getvalue()


def not_utf8():
    raw = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())


TEXT = {"text": "a"}
ASK, SAY = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
ALPACA, SHAREGPT = {"handler_name": "AlpacaStyleInstructionHandler"}, {"handler_name": "SharegptStyleInstructionHandler"}
RANKED = {"handler_name": "SharegptStylePairwiseHandler"}


def chat(*messages, **more):
    return lines({"conversations": list(messages)} | more)


def tool(**parameters):
    return json.dumps([{"name": "f", "parameters": parameters}])


# name: (file, content, options, message, place)
BAD = {
    "a column is missing": ("a.jsonl", lines({"body": "a"}), {}, "no column 'text'", "a.jsonl"),
    "a column is missing in one row": ("a.jsonl", lines(TEXT, {"body": "a"}), {}, "the row has no 'text'", "line 2"),
    "null": ("a.jsonl", lines(TEXT, TEXT, {"text": None}), {}, "'text' is empty (null)", "line 3"),
    "a number": ("a.jsonl", lines({"text": 5}), {}, "'text' is a int", "line 1"),
    "a list": ("a.jsonl", lines({"text": ["a"]}), {}, "'text' is a list", "line 1"),
    "half a line of JSON": ("a.jsonl", lines(TEXT, '{"text": "a'), {}, "not JSON", "line 2"),
    "no object in a line": ("a.jsonl", lines(TEXT, "3"), {}, "a int where a JSON object is expected", "line 2"),
    "broken UTF-8 in JSON lines": ("a.jsonl", lines(TEXT) + b'{"text": "\xff"}\n', {}, "not JSON", "line 2"),
    "a lone surrogate": ("a.json", b'[{"text": "\\ud800"}]', {}, "'text' is not UTF-8", "row 1"),
    "broken UTF-8 in text": ("a.txt", b"a\n\xc3\x28\n", {}, "not UTF-8", "line 2"),
    "broken UTF-8 in an array": ("a.json", b'[{"text": "a"}, {"text": "\xff"}]', {}, "not UTF-8", "a.json"),
    "an array cut off": ("a.json", b'[{"text": "a"}, {"te', {}, "not a JSON array", "row 2"),
    "something after an array": ("a.json", b'[{"text": "a"}] x', {}, "follows the end of the array", "row 2"),
    "no object in an array": ("a.json", b'[{"text": "a"}, "b"]', {}, "a str where a JSON object is expected", "row 2"),
    "a field too many in CSV": ("a.csv", b"text\na\nb,c\n", {}, "2 fields, the header has 1", "row 2"),
    "an open quote in CSV": ("a.csv", b'text\n"a', {}, "not CSV", "a.csv"),
    "broken UTF-8 in CSV": ("a.csv", b"text\na\n\xff\n", {}, "'text' is not UTF-8", "row 2"),
    "not parquet": ("a.parquet", b"PAR1 and so on", {}, "not a parquet file", "a.parquet"),
    "parquet cut off": ("a.parquet", parquet(pyarrow.array(["a"] * 999))[:-40], {}, "not a parquet file", "a.parquet"),
    "broken UTF-8 in parquet": ("a.parquet", parquet(not_utf8()), {}, "not UTF-8", "row 2"),
    "numbers in parquet": ("a.parquet", parquet(pyarrow.array([1, 2])), {}, "'text' is a int", "row 1"),
    "not Arrow": ("a.arrow", b"ARROW1 and so on", {}, "not an Arrow file", "a.arrow"),
    "null in Arrow": ("a.arrow", arrow([TEXT] * 600 + [{"text": None}]), {"piece_size": 0.001}, "'text' is empty", "row 601"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(lines(*[TEXT] * 99))[:-9], {}, "cannot be read to its end", "a.jsonl.gz"),
    "not gzip": ("a.jsonl.gz", b"\x1f\x8b\x08 nonsense", {}, "cannot be read", "a.jsonl.gz"),
    "zstd cut off": ("a.jsonl.zst", pyarrow.compress(lines(*[TEXT] * 999), "zstd", asbytes=True)[:-9], {},
                     "cannot be read to its end", "a.jsonl.zst"),
    "an unknown ending": ("a.docx", b"PK", {}, ".docx is not a supported format", "a.docx"),
    "an empty file": ("a.jsonl", b"", {}, "has no tokens", "a.jsonl"),
    "no instruction": ("a.jsonl", lines({"output": "a"}), ALPACA, "no column 'instruction'", "a.jsonl"),
    "an answer that is null": ("a.jsonl", lines({"instruction": "q", "output": None}), ALPACA, "'output' is empty", "line 1"),
    "two answers": ("a.jsonl", lines({"instruction": "q", "output": ["a", "b"]}), ALPACA, "'output' is a list", "line 1"),
    "a history of one": ("a.jsonl", lines({"instruction": "q", "output": "a", "history": [["q"]]}), ALPACA,
                         "history is not a list of questions and answers", "line 1"),
    "no messages": ("a.jsonl", chat(), SHAREGPT, "the conversation is empty", "line 1"),
    "the assistant begins": ("a.jsonl", chat(SAY, ASK), SHAREGPT, "turn 1 is from assistant", "line 1"),
    "two questions": ("a.jsonl", chat(ASK, ASK, SAY), SHAREGPT, "turn 2 is from user", "line 1"),
    "no answer": ("a.jsonl", chat(ASK, SAY, ASK), SHAREGPT, "the last message is not answered", "line 1"),
    "an unknown speaker": ("a.jsonl", chat({"from": "bot", "value": "a"}), SHAREGPT, "a message is from 'bot'", "line 1"),
    "a message without text": ("a.jsonl", chat({"from": "human"}, SAY), SHAREGPT, "'value' is empty", "line 1"),
    "messages of another form": ("a.jsonl", chat({"role": "user", "content": "q"}, SAY), SHAREGPT, "a message has no 'from'",
                                 "line 1"),
    "messages that are a text": ("a.jsonl", lines({"conversations": "q"}), SHAREGPT, "a text but not a JSON list", "line 1"),
    "tools that are no JSON": ("a.jsonl", chat(ASK, SAY, tools="add"), SHAREGPT, "the tools are not JSON", "line 1"),
    "a tool without a name": ("a.jsonl", chat(ASK, SAY, tools='[{"a": 1}]'), SHAREGPT, "a tool has no name", "line 1"),
    "a speaker that is a list": ("a.jsonl", chat({"from": ["human"], "value": "a"}, SAY), SHAREGPT,
                                 "a message is from ['human']", "line 1"),
    "a tool that is a number": ("a.jsonl", chat(ASK, SAY, tools='[{"function": 3}]'), SHAREGPT, "a tool has no name: 3",
                                "line 1"),
    "required arguments that are not a list": ("a.jsonl", chat(ASK, SAY, tools=tool(required=True)), SHAREGPT,
                                            "required of the tool 'f' is a bool", "line 1"),
    "choices that are not a list": ("a.jsonl", chat(ASK, SAY, tools=tool(properties={"a": {"enum": 5}})), SHAREGPT,
                                 "enum of the tool 'f' is a int", "line 1"),
    "a call that is no JSON": ("a.jsonl", chat(ASK, {"from": "function_call", "value": "add(1)"}), SHAREGPT,
                               "a function call is not JSON", "line 1"),
    "no rejected answer": ("a.jsonl", chat(ASK, chosen=SAY, rejected=None), RANKED, "'rejected' is empty", "line 1"),
    "an answered question with a choice": ("a.jsonl", chat(ASK, SAY, chosen=SAY, rejected=SAY), RANKED,
                                           "the last message is from the assistant", "line 1"),
    "a map of an unknown column": ("a.jsonl", lines(TEXT), ALPACA | {"map_keys": '{"promt": "text"}'}, "unknown key 'promt'",
                                   "--map-keys"),
    "a map to a column that is not there": ("a.jsonl", lines(TEXT), ALPACA | {"map_keys": '{"prompt": "txt"}'},
                                            "no column 'txt'", "a.jsonl"),
    "a map that is no JSON": ("a.jsonl", lines(TEXT), ALPACA | {"map_keys": "{prompt: text}"}, "not JSON", "--map-keys"),
    "an unknown tag": ("a.jsonl", chat(ASK, SAY), SHAREGPT | {"map_keys": '{"tags": {"user": "human"}}'},
                       "unknown key 'user'", "--map-keys, tags"),
    "a map without use": ("a.jsonl", lines(TEXT), {"map_keys": "{}"}, "no columns to map", "--map-keys"),
    "no template": ("a.jsonl", chat(ASK, SAY), SHAREGPT | {"prompt_type": None}, "no template is given", "--prompt-type"),
    "a template without use": ("a.jsonl", lines(TEXT), {"prompt_type": "qwen"}, "uses no template", "--prompt-type"),
}
ROWS = [name for name in BAD if BAD[name][4].startswith(("line", "row")) and "array" not in name]


def run(tmp_path, byte_folder, name, **more):
    file, content, options, message, place = BAD[name]
    (tmp_path / file).write_bytes(content)
    chats = {"prompt_type": "qwen"} if "handler_name" in options else {}
    return message, place, lambda: preprocess(PreprocessOptions(
        input=(str(tmp_path / file),), output_prefix=tmp_path / "out" / "set", tokenizer_name_or_path=byte_folder,
        **chats | options | more), show=False)


def test_there_are_enough():
    assert len(BAD) >= 30


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_named_and_leave_nothing(tmp_path, byte_folder, name):
    message, place, work = run(tmp_path, byte_folder, name)
    with pytest.raises(ModelLinkError) as caught:
        work()
    error = caught.value
    assert message in error.what and place in str(error.where) and error.exit_status == 2
    assert error.fix or "row" not in str(error.where)
    left = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert left == (["set.parts"] if "piece_size" in BAD[name][2] else [])  # finished pieces stay for the next run
    assert left or not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_are_skipped_and_listed(tmp_path, byte_folder, name):
    message, place, work = run(tmp_path, byte_folder, name, on_bad_row="skip")
    try:
        summary = work()
    except ModelLinkError as error:  # nothing else was in the file
        assert "has no tokens" in error.what
        return
    assert summary.skipped_rows >= 1 and summary.rows >= 1
    assert message in summary.bad_rows[0] and place in summary.bad_rows[0]
