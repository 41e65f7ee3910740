# SPDX-License-Identifier: Apache-2.0
"""Finding and reading the questions on disk."""

import csv
import json
from pathlib import Path

import pytest

from modellink.eval import load_task
from modellink.eval.data import read_subjects
from modellink.kernels.errors import ModelLinkError

MMLU, BOOLQ = load_task("mmlu"), load_task("boolq")
GOOD = ("What?", "1", "2", "3", "4", "B")
PASSAGE = {"passage": "p", "question": "q", "answer": True}


def fails(task, *folders):
    with pytest.raises(ModelLinkError) as caught:
        read_subjects(task, list(folders))
    return str(caught.value)


def test_examples_are_the_first_rows_in_the_files_order(data):
    cities, rivers = read_subjects(MMLU, [data])
    assert (cities.name, len(cities.rows), rivers.name, len(rivers.rows)) == ("old_cities", 14, "rivers", 9)
    with (data / "mmlu/dev/old_cities_dev.csv").open(newline="") as file:
        written = list(csv.reader(file))
    assert [list(row.values()) for row in cities.examples] == written[:5]


@pytest.mark.parametrize("where", [".", "mmlu", "mmlu/test"])
def test_the_folder_may_be_any_of_those_above(data, where):
    assert [subject.name for subject in read_subjects(MMLU, [data / where])] == ["old_cities", "rivers"]


def test_the_name_of_the_folder_says_nothing(data, tmp_path):
    (data / "mmlu").rename(tmp_path / "boolq-or-not")
    assert len(read_subjects(MMLU, [tmp_path / "boolq-or-not"])) == 2


def test_linked_folders_are_followed(data, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "set").symlink_to(data / "mmlu")
    assert len(read_subjects(MMLU, [tmp_path / "links"])) == 2


def test_the_same_file_through_two_folders_counts_once(data):
    assert len(read_subjects(MMLU, [data, data / "mmlu", data / "mmlu" / "test"])) == 2


def test_two_files_of_one_subject_are_refused(data, write_csv):
    write_csv(data / "copy" / "rivers_test.csv", [GOOD])
    message = fails(MMLU, data)
    assert "rivers was found twice" in message and "copy/rivers_test.csv" in message


def test_max_samples_takes_the_first_rows_of_each_subject(data):
    assert [[row.number for row in subject.rows] for subject in read_subjects(MMLU, [data], 3)] == [[1, 2, 3]] * 2


def test_dev_comes_before_other_jsonl_files(data, write_jsonl):
    write_jsonl(data / "boolq" / "train.jsonl", [PASSAGE])
    assert [subject.name for subject in read_subjects(BOOLQ, [data])] == ["dev"]


def test_any_jsonl_of_that_form_is_read_where_there_is_no_dev(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "mine.jsonl", [PASSAGE])
    write_jsonl(tmp_path / "sub" / "other.jsonl", [{"prompt": "of another set"}])
    assert [subject.name for subject in read_subjects(BOOLQ, [tmp_path])] == ["mine"]


def test_another_sets_files_of_the_same_name_are_left_alone(data, write_csv):
    """C-Eval's test files have as many columns, and a header that ends with a letter."""
    write_csv(data / "ceval" / "law_test.csv", [("id", "question", "A", "B", "C", "D"), ("0", "q", "1", "2", "3", "4")])
    assert [subject.name for subject in read_subjects(MMLU, [data])] == ["old_cities", "rivers"]


def test_nothing_there_says_what_was_looked_for(tmp_path, write_csv):
    write_csv(tmp_path / "law_test.csv", [("id", "question", "A", "B", "C", "D", "answer")])
    message = fails(MMLU, tmp_path)
    assert "no data of mmlu was found" in message and str(tmp_path) in message
    assert "expected files named *_test.csv" in message
    assert "law_test.csv, row 1 does not match: 7 columns, there must be 6" in message


def test_a_missing_folder_is_named(tmp_path):
    assert "the folder does not exist" in fails(MMLU, tmp_path / "nothing") and "nothing" in fails(MMLU, tmp_path / "nothing")


def test_a_missing_file_of_examples_is_named(data):
    (data / "mmlu/dev/rivers_dev.csv").unlink()
    message = fails(MMLU, data)
    assert "examples of rivers are missing" in message and "put rivers_dev.csv into" in message


def test_too_few_examples(data, write_csv):
    write_csv(data / "mmlu/dev/rivers_dev.csv", [GOOD] * 4)
    assert "4 rows, mmlu needs 5 examples" in fails(MMLU, data)


@pytest.mark.parametrize(("rows", "what"), [
    ([GOOD, GOOD[:5]], "5 columns, there must be 6: question, A, B, C, D, answer"),
    ([GOOD, (*GOOD[:5], "E")], "answer is 'E', it must be one of A, B, C, D"),
    ([GOOD, ("  ", *GOOD[1:])], "question is '  ', it must be a text that is not blank"),
])
def test_a_broken_csv_row_is_named(data, write_csv, rows, what):
    path = write_csv(data / "mmlu/test/rivers_test.csv", rows)
    message = fails(MMLU, data)
    assert what in message and f"{path}, row 2" in message


def test_a_broken_first_row_beside_good_files_is_not_somebody_elses(data, write_csv):
    path = write_csv(data / "mmlu/test/rivers_test.csv", [(*GOOD[:5], "b")])
    assert f"{path}, row 1" in fails(MMLU, data)


def test_a_row_after_a_field_of_two_lines_says_both_numbers(data):
    path = data / "mmlu/test/rivers_test.csv"
    path.write_text('"two\nlines",1,2,3,4,A\nx,1,2,3,4,F\n')
    assert f"{path}, row 2 (line 3)" in fails(MMLU, data)


@pytest.mark.parametrize(("row", "what"), [
    ({"passage": "p", "question": "q", "answer": "yes"}, "answer is 'yes', it must be true or false"),
    ({"passage": "p", "question": "q"}, "answer is missing, it must be true or false"),
    ({"passage": "p", "question": 3, "answer": True}, "question is 3"),
    (["p"], "not an object with passage"),
])
def test_a_broken_jsonl_row_is_named(tmp_path, write_jsonl, row, what):
    path = write_jsonl(tmp_path / "dev.jsonl", [PASSAGE, row])
    message = fails(BOOLQ, tmp_path)
    assert what in message and f"{path}, row 2" in message


def test_a_cut_off_line_is_named(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps(PASSAGE) + "\n" + json.dumps(PASSAGE)[:20])
    assert f"{path}, row 2" in fails(BOOLQ, tmp_path)


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_bytes(json.dumps(PASSAGE).encode() + b"\n" + '{"passage": "é"'.encode("latin-1") + b"\n")
    message = fails(BOOLQ, tmp_path)
    assert "not UTF-8" in message and str(path) in message


def test_an_empty_file_is_no_set(tmp_path):
    (tmp_path / "dev.jsonl").touch()
    assert "dev.jsonl is empty" in fails(BOOLQ, tmp_path)


def test_the_real_sets_are_read_whole(real_data):
    (boolq,) = read_subjects(BOOLQ, [real_data])
    assert len(boolq.rows) == 3270 and sum(row.values["answer"] for row in boolq.rows) == 2033
    mmlu = {subject.name: len(subject.rows) for subject in read_subjects(MMLU, [real_data])}
    assert mmlu == {"abstract_algebra": 100, "anatomy": 135, "computer_security": 100, "global_facts": 100,
                    "high_school_biology": 310, "world_religions": 171}


def test_the_quickstarts_questions_are_read():
    folder = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "eval-data"
    if not folder.is_dir():
        pytest.skip("not in a checkout")
    (boolq,) = read_subjects(BOOLQ, [folder])
    assert (len(boolq.rows), sum(row.values["answer"] for row in boolq.rows)) == (20, 10)
    assert [len(subject.rows) for subject in read_subjects(MMLU, [folder])] == [10, 10]
