# SPDX-License-Identifier: Apache-2.0
"""Files are complete or absent: kills at named points, and what a reader finds then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import (
    Journal,
    atomic_folder,
    atomic_write,
    incomplete,
    read_json,
    remove_leftovers,
    start_writeback,
    write_json,
)

WRITE_FILE = "from modellink.kernels.files import *\nwith atomic_write('{path}') as file: file.write(b'new')"
WRITE_FOLDER = ("from modellink.kernels.files import *\nwith atomic_folder('{path}', overwrite=True) as folder:\n"
                "    (folder / 'a').write_bytes(b'new')")


def killed(code: str, at: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MODELLINK_KILL_AT": at})
    assert done.returncode == -signal.SIGKILL


def test_a_file_is_old_or_new(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    killed(WRITE_FILE.format(path=path), "after-write")
    assert path.read_bytes() == b"old"
    subprocess.run([sys.executable, "-c", WRITE_FILE.format(path=path)], check=True)
    assert path.read_bytes() == b"new"


def test_writeback_is_a_request_of_the_kernel(tmp_path):
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(bytes(8192))
        assert start_writeback(file.fileno(), 0, 8192)
    reading, writing = os.pipe()
    assert not start_writeback(writing, 0, 8192)  # a pipe is not on a disk
    os.close(reading)
    os.close(writing)
    assert (tmp_path / "file").read_bytes() == bytes(8192)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("point", ["after-write", "before-rename"])
def test_a_killed_folder_does_not_count_and_the_old_one_stays(tmp_path, point):
    path = tmp_path / "folder"
    with atomic_folder(path) as folder:
        (folder / "a").write_bytes(b"old")
    killed(WRITE_FOLDER.format(path=path), point)
    assert (path / "a").read_bytes() == b"old" and incomplete(path) is None
    subprocess.run([sys.executable, "-c", WRITE_FOLDER.format(path=path)], check=True)
    assert (path / "a").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_reader_says_what_a_folder_lacks(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"1234")
        (folder / "b").write_bytes(b"1")
    assert incomplete(path) is None
    (path / "sub" / "a").write_bytes(b"12")
    assert "sub/a has 2 bytes instead of 4" in incomplete(path)
    (path / "sub" / "a").unlink()
    assert "sub/a is missing" in incomplete(path)
    (path / "modellink.complete").unlink()
    assert "did not finish" in incomplete(path)
    for damaged in ("", "[]", '{"files": 3}'):
        (path / "modellink.complete").write_text(damaged)
        assert "is damaged" in incomplete(path)


def test_an_output_that_exists_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("precious")
    with pytest.raises(ModelLinkError, match="the output exists"), atomic_folder(path):
        pass
    with (atomic_folder(tmp_path / "new"), pytest.raises(ModelLinkError, match="is writing to this output"),
          atomic_folder(tmp_path / "new", overwrite=True)):
        pass
    assert (path / "a").read_text() == "precious"


def test_a_journal_survives_a_cut_line(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append({"n": 1}, {"n": 2})
    with open(path, "ab") as file:
        file.write(b'{"n": 3')
    with Journal(path) as journal:
        assert [entry["n"] for entry in journal.entries] == [1, 2]
        journal.append({"n": 4})
        assert len(journal.entries) == 2
    with Journal(path) as journal:
        assert [entry["n"] for entry in journal.entries] == [1, 2, 4]


def test_a_journal_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "journal").write_text("a,b\n1,2\n")
    with pytest.raises(ModelLinkError, match="line 1 is not JSON"):
        Journal(tmp_path / "journal")
    assert (tmp_path / "journal").read_text() == "a,b\n1,2\n"


def test_json_reading_names_the_file(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ModelLinkError, match=r"not a JSON file") as caught:
        read_json(tmp_path / "b.json")
    assert "b.json" in str(caught.value)


def test_what_a_killed_write_left_can_be_removed(tmp_path):
    for name in ("a[1]", "a1"):
        killed(WRITE_FILE.format(path=tmp_path / name), "after-write")
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path / "a[1]")  # a name is not a pattern
    assert [path.name.startswith(".a1.") for path in tmp_path.iterdir()] == [True]
