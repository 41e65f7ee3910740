# SPDX-License-Identifier: Apache-2.0
"""Rows of every format, equal for any split; errors name broken rows and files with their position."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.data_prep.inputs import cut, find_inputs, open_source
from modellink.data_prep.rows import BadRow
from modellink.kernels.errors import ModelLinkError

ROWS = [{"text": f"text {number} — ä 你好 \"quoted\", and\nmore", "n": str(number)} for number in range(50)]


def as_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def as_jsonl_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def as_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def as_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"])
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)


def packed(write, compress):
    """Write a format and compress the file."""
    def write_packed(path):
        write(path)
        path.write_bytes(compress(path.read_bytes()))
    return write_packed


def zstd(content):
    """Two frames, as several programs write them."""
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (content[:99], content[99:]))


def as_arrow(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def as_arrow_stream(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


FORMATS = {"a.arrow": as_arrow, "stream.arrow": as_arrow_stream, "a.jsonl.zst": packed(as_jsonl, zstd),
           "a.json.gz": packed(as_json, gzip.compress), "a.csv.zst": packed(as_csv, zstd),
           "a.jsonl": as_jsonl, "a.jsonl.gz": as_jsonl_gz, "lines.json": as_jsonl, "a.json": as_json, "a.csv": as_csv,
           "a.parquet": as_parquet}


def rows_of(path, size=1 << 20, columns=("text", "n")):
    source = open_source(path)
    return [row for piece in cut([source], size) for where, span in piece.spans
            for _, row in open_source(where).rows(span, list(columns))]


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format_at_any_cut(tmp_path, name, size):
    FORMATS[name](tmp_path / name)
    assert rows_of(tmp_path / name, size) == ROWS
    assert open_source(tmp_path / name).columns() == ["text", "n"]


@pytest.mark.parametrize("name", FORMATS)
def test_small_chunks_change_nothing(tmp_path, name, monkeypatch):
    FORMATS[name](tmp_path / name)
    monkeypatch.setattr("modellink.data_prep.readers.CHUNK", 5)
    assert rows_of(tmp_path / name, 64) == ROWS


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=12)),
       size=st.integers(1, 40), end=st.sampled_from(["", "\n", "\r\n"]))
def test_lines_belong_to_one_piece_each(tmp_path_factory, lines, size, end):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(("\n".join(lines) + end).encode())
    got = [row["text"] for row in rows_of(path, size)]
    content = path.read_bytes().decode()
    expected = content.removesuffix("\n").split("\n") if content else []
    assert got == [line.removesuffix("\r") for line in expected]


def test_text_lines_lose_their_ends_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one \r\n\ntwo")
    assert rows_of(tmp_path / "a.txt") == [{"text": " one "}, {"text": ""}, {"text": "two"}]


@pytest.mark.parametrize(("name", "content", "place", "why"), [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3", "not JSON"), ("a.jsonl", b'[1]\n', "line 1", "a list where"),
    ("a.jsonl", b'{"text": "\xff"}\n', "line 1", "not JSON"), ("a.txt", b"a\nb\n\xff\xfe", "line 3", "not UTF-8"),
    ("a.csv", b"text,n\na,1\nb\n", "row 2", "1 fields, the header has 2"),
    ("a.json", b'[{"text": "a"}, 7]', "row 2", "a int where")])
def test_bad_rows_have_a_place(tmp_path, name, content, place, why):
    (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path / name)
    bad = [(*source.name_places([at]), row.why) for at, row in source.rows(source.cut(1000)[0], []) if isinstance(row, BadRow)]
    assert len(bad) == 1 and bad[0][0] == f"{tmp_path / name}, {place}" and why in bad[0][1]


def test_broken_utf8_in_parquet_spoils_its_row_alone(tmp_path):
    raw = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", columns=["text"])
    assert rows[0] == {"text": "a"} and isinstance(rows[1], BadRow) and rows[2] == {"text": "c"}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.parquet", b"PAR1", "not a parquet file"), ("a.json", b'[{"text": "a"}, {"te', "not a JSON array of objects"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', "'{' where , or ]"), ("a.json", b'[1, 2] 3', "follows the end of the array"),
    ("a.json", b'"text"', "where \\[ belongs"), ("a.csv", b'text\n"a', "not CSV"), ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "cannot be read to its end"),
    ("a.txt.gz", b"\x1f\x8bnonsense", "cannot be read to its end")])
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLinkError, match=message) as caught:
        rows_of(tmp_path / name)
    assert name in str(caught.value.where)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.zst", "a.jsonl.gz", "a.json.zst"])
def test_files_whose_beginning_is_broken_are_named(tmp_path, name):
    content = (b"text,n\n" if "csv" in name else b'{"text": "a"}\n') * 100
    packed = gzip.compress(content) if name.endswith("gz") else pyarrow.compress(content, "zstd", asbytes=True)
    (tmp_path / name).write_bytes(packed[:12])
    with pytest.raises(ModelLinkError, match="cannot be read"):
        open_source(tmp_path / name).columns()


def test_a_json_array_is_not_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 500))
    monkeypatch.setattr("modellink.data_prep.readers.CHUNK", 4096)
    source = open_source(path)
    rows = source.rows((0, 1), [])
    next(rows)
    path.write_text("[")  # what is still to come is not in memory
    with pytest.raises(ModelLinkError):
        list(rows)


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", ".hidden.jsonl", "notes.md"):
        as_jsonl(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in find_inputs([str(tmp_path)])]
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert find_inputs(["b.jsonl", "a.*"]) == [Path("b.jsonl"), Path("a.jsonl")]


def test_small_files_share_a_piece(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"0123456789\n")
    pieces = cut([open_source(path) for path in find_inputs([str(tmp_path)])], 22)
    assert [[path.name for path, _ in piece.spans] for piece in pieces] == [["0.txt", "1.txt"], ["2.txt", "3.txt"], ["4.txt"]]
    assert [(piece.index, piece.bytes) for piece in pieces] == [(0, 22), (1, 22), (2, 11)]


@pytest.mark.parametrize(("inputs", "message"), [
    (["absent.jsonl"], "does not exist"), (["*.parquet"], "matches no file"), (["empty"], "no file with a supported extension"),
    (["mixed"], "several formats: .jsonl, .txt"), (["a.jsonl", "a.jsonl"], "given twice"),
    (["a.docx"], ".docx is not a supported format")])
def test_wrong_inputs_are_named(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "a.docx", "mixed/a.jsonl", "mixed/LICENSE.txt"):
        as_jsonl(tmp_path / name)
    with pytest.raises(ModelLinkError, match=message):
        [open_source(path) for path in find_inputs(inputs)]
