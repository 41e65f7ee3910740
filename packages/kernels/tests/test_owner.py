# SPDX-License-Identifier: Apache-2.0
"""One writer per output: who is refused, which owner counts as gone, and that at most one process replaces it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from modellink.kernels import owner
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.owner import owned, owner_file, take

fork = multiprocessing.get_context("fork")


class Clock:
    """Replaces the module's `time`: sleeping takes no time, and calls `during` with the seconds since the start."""

    def __init__(self, during=lambda seconds: None):
        self.seconds, self.during = 0.0, during

    def monotonic(self):
        return self.seconds

    def time(self):
        return 0.0

    def sleep(self, seconds):
        self.seconds += seconds
        self.during(self.seconds)


def write(path, **changed):
    record = replace(owner._record(), **changed)
    path.write_text(json.dumps(asdict(record)))
    os.utime(path, (1000, 1000))
    return record


def leave(path):
    """An owner file whose process was killed."""
    def hold():
        take(path)
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=hold)
    process.start()
    process.join()
    assert path.is_file() and process.exitcode == -signal.SIGKILL


def test_the_second_writer_is_refused_by_name(tmp_path):
    target = tmp_path / "new" / "out"
    with owned(target):
        with pytest.raises(ModelLinkError, match=rf"process {os.getpid()} \(.*\) on .+ since 2.* UTC is writing"), owned(target):
            pass
        with owned(tmp_path / "other"):  # not the same output
            pass
    assert list(tmp_path.iterdir()) == []  # no folder either
    with owned(target):
        target.touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out"]


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelLinkError, match="the output cannot be written: Not a directory"), owned(tmp_path / "file/below/out"):
        pass


def test_of_many_that_find_a_dead_owner_one_wins(tmp_path):
    path, writers = tmp_path / ".owner", 8
    for _ in range(10):
        leave(path)
        barrier, results = fork.Barrier(writers), fork.SimpleQueue()

        def contend(barrier=barrier, results=results):
            barrier.wait()
            try:
                mine = take(path)
            except ModelLinkError:
                results.put("refused")
                barrier.wait()
            else:
                barrier.wait()  # all others have tried
                results.put("lost" if mine.lost else "won")
                mine.release()

        processes = [fork.Process(target=contend) for _ in range(writers)]
        for process in processes:
            process.start()
        found = sorted(results.get() for _ in range(writers))
        for process in processes:
            process.join()
        assert found == ["refused"] * (writers - 1) + ["won"]
        assert list(tmp_path.iterdir()) == []


def test_all_that_wait_get_their_turn(tmp_path):
    log = tmp_path / "log"

    def append():
        with owned(tmp_path / "out", wait=True):
            text = log.read_text() if log.exists() else ""
            log.write_text(text + "x")

    processes = [fork.Process(target=append) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert log.read_text() == "xxxxxx"


def test_a_process_number_that_was_used_again_is_not_the_owner(tmp_path):
    write(tmp_path / ".owner", started=1)
    take(tmp_path / ".owner").release()
    write(tmp_path / ".owner")
    with pytest.raises(ModelLinkError, match="is writing"):
        take(tmp_path / ".owner")


def test_an_owner_elsewhere_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    path = tmp_path / ".owner"
    monkeypatch.setattr(owner, "CERTAIN", 1e6)
    write(path, place="another machine", host="node7", pid=1)
    monkeypatch.setattr(owner, "time", clock := Clock(lambda seconds: seconds == 19 and os.utime(path, (1020, 1020))))
    with pytest.raises(ModelLinkError, match=r"process 1 \(.*\) on node7 since"):
        take(path)
    assert clock.seconds == 19
    monkeypatch.setattr(owner, "time", clock := Clock())
    take(path).release()
    assert clock.seconds == pytest.approx(owner.LIMIT, abs=1)
    write(path, place="another machine")
    monkeypatch.setattr(owner, "time", clock := Clock())
    monkeypatch.setattr(clock, "time", lambda: 1e7)  # it was touched long ago
    take(path).release()
    assert clock.seconds == 0


def test_an_owner_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "INTERVAL", 0.01)
    held = take(tmp_path / ".owner")
    os.utime(held.path, (1000, 1000))
    held._thread.join(0.2)
    while held.path.stat().st_mtime == 1000:
        held._thread.join(0.2)
    held.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}', "\ud800"])
def test_a_file_without_an_owner_is_replaced(tmp_path, monkeypatch, text):
    (tmp_path / ".owner").write_text(text, "utf-8", "surrogatepass")
    monkeypatch.setattr(owner, "time", clock := Clock())
    monkeypatch.setattr(clock, "time", lambda: 0.0)
    take(tmp_path / ".owner").release()
    assert clock.seconds == pytest.approx(owner.INCOMPLETE_LIMIT, abs=1) and list(tmp_path.iterdir()) == []


def test_one_killed_while_replacing_leaves_nothing_that_refuses(tmp_path):
    path = tmp_path / ".owner"
    leave(path)
    dead = owner._read(path)
    leave(guard := Path(f"{path}.{dead.token[:12]}"))
    leave(Path(f"{guard}.{owner._read(guard).token[:12]}"))
    leave(Path(f"{path}.{'0' * 12}"))
    held = take(path)
    assert [file.name for file in tmp_path.iterdir()] == [".owner"]
    held.release()


def test_an_owner_that_lost_its_output_is_told_and_removes_nothing(tmp_path):
    target = tmp_path / "run"
    with owned(target, inside=True) as held:
        held.check()
        newer = write(owner_file(target, inside=True), pid=7, token="another")
        with pytest.raises(ModelLinkError, match=r"process 7 \(.*\) on .* has taken over this output"):
            held.check()
    assert owner._read(held.path) == newer
    held.path.unlink()
    with owned(target, inside=True) as held:
        held.path.unlink()
        target.rmdir()
        with pytest.raises(ModelLinkError, match="was removed"):
            held.check()


def test_a_successor_that_knows_the_dead_owner_does_not_wait(tmp_path):
    dead = write(tmp_path / ".owner", place="another machine")
    take(tmp_path / ".owner", after=dead.token).release()
