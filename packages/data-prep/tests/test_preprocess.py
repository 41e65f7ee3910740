# SPDX-License-Identifier: Apache-2.0
"""Preprocessing: the ids, equal bytes for any workers and pieces, and errors that leave no files."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from modellink.data_prep import IndexedDataset, PreprocessOptions, Tokenizer, preprocess
from modellink.data_prep.readers import Lines
from modellink.kernels.errors import ModelLinkError

SMALL = 0.05  # MiB: about ten pieces of the corpus


@pytest.fixture
def run(corpus, byte_folder, tmp_path):
    def run(name="out", **options):
        values = {"input": (str(corpus),), "output_prefix": tmp_path / name / "set", "tokenizer_name_or_path": byte_folder}
        return preprocess(PreprocessOptions(**values | options), show=False)
    return run


def texts_of(path, key="text"):
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def test_documents_hold_the_ids_of_the_rows(run, corpus, byte_tokenizer, tmp_path):
    summary = run(append_eod=True)
    data = IndexedDataset(tmp_path / "out" / "set_text_document")
    expected = [[*byte_tokenizer.encode(text), 2] for text in texts_of(corpus)]
    assert [list(document) for document in data] == expected
    assert data.document_count == len(data) == 250 and data.dtype == np.uint16
    assert summary.documents == {"text": 250} and summary.tokens == {"text": sum(map(len, expected))}
    assert summary.text_bytes == sum(len(text.encode()) for text in texts_of(corpus))
    assert "tokenizers " in summary.backend and summary.tokens_per_second > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["set_text_document.bin", "set_text_document.idx"]


def test_a_tokenizer_puts_its_own_tokens_around_a_text(run, corpus, piece_folder, piece_tokenizer, tmp_path):
    run(tokenizer_name_or_path=piece_folder, append_eod=True)
    first = IndexedDataset(tmp_path / "out" / "set_text_document")[0]
    assert first[0] == 1 and first[-1] == 2 and list(first[1:-1]) == piece_tokenizer.encode(texts_of(corpus)[0], False)


def test_each_column_is_a_dataset(run, corpus, byte_tokenizer, tmp_path):
    run(json_keys=("text", "title"))
    data = IndexedDataset(tmp_path / "out" / "set_title_document")
    assert [byte_tokenizer.decode(list(ids)) for ids in data] == texts_of(corpus, "title")
    assert len(IndexedDataset(tmp_path / "out" / "set_text_document")) == 250


def test_same_bytes_for_any_number_of_workers_and_any_cut(run, tmp_path, snapshot):
    assert run("one").pieces == 1
    for name, workers, size in (("cut", 1, SMALL), ("two", 2, SMALL), ("three", 3, 0.11)):
        assert run(name, workers=workers, piece_size=size).pieces > 3
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "one")


def test_same_bytes_from_every_format(run, corpus, tmp_path, snapshot):
    run("jsonl")
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    for name in ("a.jsonl.gz", "a.json", "a.parquet"):
        run(name + "-out", input=(str(tmp_path / name),), piece_size=SMALL)
        assert snapshot(tmp_path / (name + "-out")) == snapshot(tmp_path / "jsonl")


def test_inputs_in_the_order_given(run, tmp_path, write_lines, byte_tokenizer):
    a, b = (write_lines(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "ab")
    run(input=(str(b), str(a)))
    data = IndexedDataset(tmp_path / "out" / "set_text_document")
    assert [byte_tokenizer.decode(list(ids)) for ids in data] == ["b", "a"]


def test_int32_as_the_original_wrote(run, tmp_path):
    run("wide", output_dtype="int32")
    run("narrow")
    wide, narrow = (IndexedDataset(tmp_path / name / "set_text_document") for name in ("wide", "narrow"))
    assert wide.dtype == np.int32 and (wide.tokens == narrow.tokens).all()


@pytest.mark.parametrize("backend", ["auto", "tokenizers"])
@pytest.mark.parametrize("folder", ["byte_folder", "piece_folder"])  # the second puts a bos token before a text
def test_empty_texts_are_no_documents(run, tmp_path, write_lines, request, folder, backend):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    write_lines(tmp_path / "b.jsonl", [{"text": ""}])
    summary = run(input=(str(path), str(tmp_path / "b.jsonl")), append_eod=True, piece_size=0.001, tokenizer_backend=backend,
                  tokenizer_name_or_path=request.getfixturevalue(folder))
    assert summary.documents == {"text": 2} and summary.rows == 4
    tokenizer = Tokenizer.from_folder(request.getfixturevalue(folder))
    assert [tokenizer.decode(ids) for ids in IndexedDataset(tmp_path / "out" / "set_text_document")] == ["a", "b"]


BAD = [{"text": "a"}, {"text": None}, {"other": 1}, {"text": 5}, {"text": "b"}]


def test_bad_rows_may_be_left_out_and_are_counted(run, tmp_path, write_lines):
    path = write_lines(tmp_path / "bad.jsonl", BAD)
    summary = run(input=(str(path),), on_bad_row="skip")
    assert (summary.rows, summary.skipped_rows) == (2, 3)
    assert summary.bad_rows == [f"{path}, line 2: 'text' is empty (null), not a text", f"{path}, line 3: the row has no 'text'",
                                f"{path}, line 4: 'text' is a int, not a text"]


def test_lines_of_bad_rows_are_counted_once_a_file(run, tmp_path, write_lines, monkeypatch):
    """Line numbers are not computed per row, which would be quadratic in the input over many pieces."""
    paths = [write_lines(tmp_path / f"{name}.jsonl", [{"text": 1}, *[{"text": "x" * 1000}] * 9] * 8) for name in "ab"]
    named = []
    original = Lines.name_places
    monkeypatch.setattr(Lines, "name_places",
                        lambda self, places: named.append((self.path, len(places))) or original(self, places))
    summary = run(input=tuple(map(str, paths)), on_bad_row="skip", piece_size=0.002)
    assert summary.pieces > 8 and named == [(paths[0], 8), (paths[1], 8)]
    assert [row.split(": ")[0] for row in summary.bad_rows] == [
        f"{path}, line {line}" for path in paths for line in range(1, 80, 10)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_row_is_named_for_any_number_of_workers(run, tmp_path, write_lines, workers):
    path = write_lines(tmp_path / "bad.jsonl", [{"text": "x" * 5000}] * 30 + [{"text": 1}] + [{"text": "y" * 5000}] * 3
                       + [{}] * 9)
    with pytest.raises(ModelLinkError, match="'text' is a int") as caught:
        run(input=(str(path),), workers=workers, piece_size=0.01)
    assert caught.value.where == f"{path}, line 31"


def test_after_a_bad_row_the_finished_pieces_serve_the_next_run(run, tmp_path, write_lines):
    path = write_lines(tmp_path / "bad.jsonl", [{"text": "x" * 5000}] * 30 + [{"text": 1}])
    with pytest.raises(ModelLinkError):
        run(input=(str(path),), piece_size=0.01)
    summary = run(input=(str(path),), piece_size=0.01, on_bad_row="skip")
    assert summary.pieces_found_done >= 14 and summary.documents == {"text": 30} and summary.skipped_rows == 1
    assert not (tmp_path / "out" / "set.parts").exists()


def test_other_options_do_not_use_what_is_there(run, tmp_path, write_lines, snapshot):
    path = write_lines(tmp_path / "bad.jsonl", [{"text": "x" * 5000}] * 30 + [{"text": 1}])
    with pytest.raises(ModelLinkError):
        run(input=(str(path),), piece_size=0.01)
    options = {"input": (str(path),), "on_bad_row": "skip", "append_eod": True}
    assert run(piece_size=0.01, **options).pieces_found_done == 0
    run("other", **options)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "other")


MISTAKES = {
    "missing input": ({"input": ("absent.jsonl",)}, "does not exist"),
    "misspelt column": ({"json_keys": ("titel",)}, "no column 'titel'"),
    "no tokenizer": ({"tokenizer_name_or_path": "absent"}, "tokenizer folder does not exist"),
    "unknown handler": ({"handler_name": "GeneralPretrain"}, "unknown handler 'GeneralPretrain'"),
    "id beyond the vocabulary": ({"vocab_size": 300}, "is beyond the vocabulary of 300"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_leave_nothing(run, tmp_path, name):
    options, message = MISTAKES[name]
    with pytest.raises(ModelLinkError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_near_columns_are_named(run):
    with pytest.raises(ModelLinkError) as caught:
        run(json_keys=("titel",))
    assert caught.value.fix == "did you mean title?"


def test_an_empty_input_is_no_dataset(run, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ModelLinkError, match="has no tokens"):
        run(input=(str(tmp_path / "empty.jsonl"),))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_cannot_append_it(run, tmp_path, byte_folder):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((byte_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ModelLinkError, match="no end-of-document token"):
        run(tokenizer_name_or_path=tmp_path / "bare", append_eod=True)


def test_an_output_that_exists_is_kept_or_replaced(run, tmp_path, snapshot):
    run()
    before = snapshot(tmp_path / "out")
    with pytest.raises(ModelLinkError, match="the output already exists"):
        run(append_eod=True)
    assert snapshot(tmp_path / "out") == before
    run(append_eod=True, overwrite=True)
    run("new", append_eod=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "new") != before


def test_text_from_real_files(run, real_text, byte_tokenizer, tmp_path):
    run(input=(str(real_text / "c4_demo.jsonl"),), workers=2, piece_size=0.2)
    data = IndexedDataset(tmp_path / "out" / "set_text_document")
    texts = texts_of(real_text / "c4_demo.jsonl")
    assert [byte_tokenizer.decode(list(ids)) for ids in data] == texts
