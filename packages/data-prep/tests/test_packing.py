# SPDX-License-Identifier: Apache-2.0
"""Packing: no sample is lost or cut, labels stay masked, ends are kept, and the bytes do not depend on the pieces."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.data_prep import IndexedDataset, PreprocessOptions, preprocess
from modellink.data_prep.packing import assign
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.errors import ModelLinkError

LENGTH = 128
PROGRAM = "from modellink.data_prep.cli import main; main()"
ROWS = [{"instruction": f"number {number}", "output": "word " * (number * 7 % 40 + 1),
         **({"history": [["a", "b"]]} if number % 3 else {})} for number in range(60)]


@pytest.fixture
def run(tmp_path, write_lines, byte_folder):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)

    def run(name, **options):
        summary = preprocess(PreprocessOptions(
            input=(str(path),), output_prefix=tmp_path / name / "set", tokenizer_name_or_path=byte_folder,
            handler_name="AlpacaStyleInstructionHandler", prompt_type="chatml", seq_length=LENGTH, **options), show=False)
        return [IndexedDataset(prefix) for prefix in summary.outputs.values()], summary
    return run


def first_fit_decreasing(lengths, capacity):
    """The packing rule, written as simply as possible."""
    room, found = [], {}
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        pack = next((pack for pack, left in enumerate(room) if left >= lengths[sample]), len(room))
        room += [capacity] if pack == len(room) else []
        room[pack] -= lengths[sample]
        found[sample] = pack
    return [found[sample] for sample in range(len(lengths))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_first_fit_decreasing(lengths):
    assert assign(np.array(lengths, np.int32), 20).tolist() == first_fit_decreasing(lengths, 20)


def test_a_sample_longer_than_a_pack_is_an_error():
    with pytest.raises(ModelLinkError, match="longer than a pack"):
        assign(np.array([3, 9], np.int32), 8)


def test_packs_hold_every_sample_whole(run):
    (ids, mask, labels), summary = run("packed", pack=True)
    (plain_ids, _, plain_labels), plain = run("plain")
    samples = sorted((tuple(row), tuple(marks)) for row, marks in zip(plain_ids, plain_labels, strict=True))
    found = []
    for row, numbers, marks in zip(ids, mask, labels, strict=True):
        assert len(row) == LENGTH and ids.dtype == mask.dtype == labels.dtype == np.int32
        count = int(numbers.max())
        assert np.sort(numbers[numbers > 0]).tolist() == numbers[numbers > 0].tolist()  # 1 1 1 2 2 ... then padding
        assert (row[numbers == 0] == 0).all() and (marks[numbers == 0] == IGNORE_INDEX).all()
        for number in range(1, count + 1):
            found.append((tuple(row[numbers == number]), tuple(marks[numbers == number])))
    assert sorted(found) == samples
    assert summary.tokens["packed_labels"] == labels.token_count and summary.documents["packed_labels"] == len(labels)
    assert summary.packs == len(ids) == ids.document_count < len(plain_ids)
    assert summary.fill == pytest.approx(plain.tokens["packed_labels"] / (LENGTH * summary.packs), abs=1e-3)
    assert summary.fill > 0.8
    assert summary.learned_tokens == sum((marks != IGNORE_INDEX).sum() for marks in labels)


def test_a_turn_does_not_end_a_sample(run):
    """Samples of two turns contain an end token but have a single number."""
    (ids, mask, _), _ = run("packed", pack=True)
    inside = sum(1 for row, numbers in zip(ids, mask, strict=True) for at in np.flatnonzero(row == 2)
                 if at + 1 < LENGTH and numbers[at] == numbers[at + 1] and numbers[at])
    assert inside > 20


def test_same_packs_for_any_number_of_workers_and_any_cut(run, tmp_path, snapshot):
    run("one", pack=True)
    for name, options in (("cut", {"piece_size": 0.001}), ("two", {"piece_size": 0.002, "workers": 2}), ("neat", {})):
        run(name, **{"pack": True} | options | ({"pack": False, "neat_pack": True} if name == "neat" else {}))
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "one")


def test_many_parts_need_few_open_files(run, byte_folder, tmp_path, write_lines, snapshot):
    """A large input has thousands of parts; 1,024 open files are what most machines allow, 64 make the test short."""
    write_lines(tmp_path / "rows.jsonl", ROWS * 5)
    run("one", pack=True)
    tight = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); {PROGRAM}"
    done = subprocess.run([sys.executable, "-c", tight, "--input", tmp_path / "rows.jsonl", "--output-prefix",
                           tmp_path / "tight" / "set", "--tokenizer-name-or-path", byte_folder, "--prompt-type", "chatml",
                           "--handler-name", "AlpacaStyleInstructionHandler", "--seq-length", str(LENGTH), "--pack",
                           "--piece-size", "0.001"], capture_output=True, text=True)
    assert done.returncode == 0 and "pieces" in done.stdout, done.stderr
    assert snapshot(tmp_path / "tight") == snapshot(tmp_path / "one")


@pytest.mark.parametrize(("options", "message"), [
    ({"handler_name": "GeneralPretrainHandler", "prompt_type": None}, "plain text is not packed"),
    ({"seq_length": None}, "--pack needs --seq-length"),
    ({"handler_name": "AlpacaStylePairwiseHandler", "map_keys": '{"chosen": "output", "rejected": "output"}'},
     "cannot be packed")])
def test_what_cannot_be_packed(tmp_path, write_lines, byte_folder, options, message):
    values = {"handler_name": "AlpacaStyleInstructionHandler", "prompt_type": "chatml", "seq_length": LENGTH, "pack": True}
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ModelLinkError, match=message):
        preprocess(PreprocessOptions(input=(str(path),), output_prefix=tmp_path / "out" / "x",
                                     tokenizer_name_or_path=byte_folder, **values | options), show=False)
    assert not (tmp_path / "out").exists()
