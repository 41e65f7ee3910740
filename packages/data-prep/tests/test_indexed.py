# SPDX-License-Identifier: Apache-2.0
"""Megatron's two files: exact bytes, complete or absent, and errors that name the damage."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.data_prep import IndexedDataset, IndexedWriter, merge
from modellink.data_prep.indexed import token_dtype
from modellink.kernels.errors import ModelLinkError

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [], [[65_000]]]  # the third has no sequence


def write(prefix, documents=DOCUMENTS, dtype="<u2"):
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for sequences in documents:
            writer.add_document(*sequences)
    return IndexedDataset(prefix)


@pytest.mark.parametrize(("dtype", "code", "letter"), [("<u2", 8, "H"), ("<i4", 4, "i")])
def test_the_bytes_are_the_format(tmp_path, dtype, code, letter):
    write(tmp_path / "a", dtype=dtype)
    size = struct.calcsize(letter)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack(f"<7{letter}", 1, 2, 3, 4, 5, 6, 65_000)
    assert (tmp_path / "a.idx").read_bytes() == b"".join([
        b"MMIDIDX\x00\x00", struct.pack("<QBQQ", 1, code, 4, 5), struct.pack("<4i", 3, 1, 2, 1),
        struct.pack("<4q", 0, 3 * size, 4 * size, 6 * size), struct.pack("<5q", 0, 1, 3, 3, 4)])


def test_reading_back(tmp_path):
    data = write(tmp_path / "a")
    assert len(data) == 4 and data.document_count == 4 and data.token_count == 7
    assert [list(sequence) for sequence in data] == [[1, 2, 3], [4], [5, 6], [65_000]]
    assert [[list(sequence) for sequence in data.document(index)] for index in range(4)] == DOCUMENTS
    assert list(data[-1]) == [65_000] and data.dtype == np.uint16
    for call in (lambda: data[4], lambda: data.document(4)):
        with pytest.raises(IndexError):
            call()


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.lists(st.lists(st.integers(-2**31, 2**31 - 1), max_size=5), max_size=3), max_size=12),
       cuts=st.lists(st.integers(0, 12), max_size=3))
def test_merged_parts_are_the_whole(tmp_path_factory, documents, cuts):
    folder = tmp_path_factory.mktemp("merge")
    write(folder / "whole", documents, "<i4")
    edges = sorted([0, *cuts, 12])
    parts = [folder / f"part{number}" for number in range(len(edges) - 1)]
    for part, start, stop in zip(parts, edges, edges[1:], strict=False):
        write(part, documents[start:stop], "<i4")
    merge(parts, folder / "merged", show=False)
    for ending in (".bin", ".idx"):
        assert (folder / f"merged{ending}").read_bytes() == (folder / f"whole{ending}").read_bytes()


def test_an_index_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("modellink.data_prep.indexed.CHUNK", 3)
    documents = [[[number] * (number % 4 + 1)] for number in range(20)]
    data = write(tmp_path / "a", documents)
    assert [list(sequence) for sequence in data] == [document[0] for document in documents]


def test_token_type_by_megatrons_rule():
    assert token_dtype(65_499) == np.uint16 and token_dtype(65_500) == np.int32 and token_dtype(None) == np.int32


def test_an_id_that_does_not_fit_leaves_nothing(tmp_path):
    with pytest.raises(ModelLinkError, match="from 1 to 65536 do not fit uint16"):
        write(tmp_path / "a", [[[1, 65_536]]])
    assert not list(tmp_path.iterdir())


def test_a_failed_writer_keeps_what_was_there(tmp_path):
    write(tmp_path / "a")
    before = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        writer.add_document([1])
        raise ZeroDivisionError
    assert before == ((tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes())


def test_no_moment_shows_an_index_beside_tokens_of_another_dataset(tmp_path, monkeypatch):
    write(tmp_path / "a")

    def stop(point):
        if point == "before-index":
            raise KeyboardInterrupt

    monkeypatch.setattr("modellink.data_prep.indexed.kill_point", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[[9] * 7]])
    with pytest.raises(ModelLinkError, match="unfinished"):
        IndexedDataset(tmp_path / "a")


def test_parts_of_other_types_do_not_merge(tmp_path):
    write(tmp_path / "a", dtype="<u2")
    write(tmp_path / "b", dtype="<i4")
    with pytest.raises(ModelLinkError, match="the token type is int32, that of the output is uint16"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", show=False)
    assert not (tmp_path / "c.bin").exists()


def put(value, at):
    def damage(content):
        return content[:at] + value + content[at + len(value):]
    return damage


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("idx", put(b"X", 0), "not an index"), ("idx", lambda content: content[:20], "not an index"),
    ("idx", put(b"\x02", 9), "unknown version"), ("idx", put(b"\x09", 17), "unknown version 1 or token type 9"),
    ("idx", lambda content: content[:-1], "its header implies"), ("idx", put(b"\xff" * 8, 18), "its header implies"),
    ("idx", put(struct.pack("<i", -1), 34), "sequence 0 does not begin"),
    ("idx", put(struct.pack("<q", 7), 34 + 16 + 8), "sequence 1 does not begin where"),
    ("idx", put(struct.pack("<q", 1), 34 + 48), "do not cover"), ("idx", put(struct.pack("<q", 4), 34 + 48 + 8), "do not cover"),
    ("bin", lambda content: content[:-2], "the tokens take 12 bytes, the index implies 14"),
    ("bin", lambda content: content + b"\x00", "the tokens take 15 bytes")])
def test_damage_is_named(tmp_path, file, damage, message):
    write(tmp_path / "a")
    path = tmp_path / f"a.{file}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelLinkError, match=message) as caught:
        IndexedDataset(tmp_path / "a")
    assert caught.value.where == path


def test_one_file_alone_is_unfinished(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a.idx").unlink()
    with pytest.raises(ModelLinkError, match="unfinished"):
        IndexedDataset(tmp_path / "a.bin")
    with pytest.raises(ModelLinkError, match="dataset does not exist"):
        IndexedDataset(tmp_path / "b")
