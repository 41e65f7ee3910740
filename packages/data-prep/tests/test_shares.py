# SPDX-License-Identifier: Apache-2.0
"""Shares: the same bytes as a single run, in any order and distribution, killed or not, and on a Ray cluster."""

import errno
import fcntl
import os
import signal
import sys
from pathlib import Path

import pytest

from modellink.data_prep import PreprocessOptions, preprocess
from modellink.data_prep.parts import alone
from modellink.kernels.errors import ModelLinkError

SMALL = ("--piece-size", "0.05")


@pytest.fixture
def arguments(corpus, byte_folder):
    return ["--input", corpus, "--tokenizer-name-or-path", byte_folder, "--append-eod", *SMALL, "--output-prefix", "out/set"]


@pytest.fixture(scope="session")
def expected(corpus, byte_folder, tmp_path_factory, snapshot):
    """The files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    preprocess(PreprocessOptions(input=(str(corpus),), tokenizer_name_or_path=byte_folder, append_eod=True,
                                 output_prefix=folder / "set"), show=False)
    return snapshot(folder)


def test_shares_in_any_order_and_joined(command, arguments, expected, snapshot, tmp_path):
    made: set[int] = set()
    for share in ("2/3", "0/3", "1/3"):
        done = command(*arguments, "--piece", share)
        assert done.returncode == 0 and "not yet joined" in done.stdout, done.stderr
        assert not list((tmp_path / "out").glob("*.idx"))
        made |= {int(share[0]) + 3 * number for number in range(3)}
        parts = {int(path.name[:6]) for path in (tmp_path / "out" / "set.parts").glob("*.bin")}
        assert parts == made, "a share does its own pieces alone"
    joined = command(*arguments, "--summary", "summary.json")
    assert joined.returncode == 0 and "9 found done" in joined.stdout
    assert snapshot(tmp_path / "out") == expected


def test_a_killed_share_goes_on_and_a_lost_one_is_made_up_for(command, arguments, expected, snapshot, tmp_path):
    killed = command(*arguments, "--piece", "0/2", MODELLINK_KILL_AT="piece-noted")
    assert killed.returncode == -signal.SIGKILL
    again = command(*arguments, "--piece", "0/2")
    assert again.returncode == 0 and "1 found done" in again.stdout
    lost = command(*arguments, "--piece", "1/2", MODELLINK_KILL_AT="after-write")  # and never tried again
    assert lost.returncode == -signal.SIGKILL
    assert command(*arguments).returncode == 0
    assert snapshot(tmp_path / "out") == expected


def test_shares_with_other_options_are_not_joined_and_not_thrown_away(command, arguments, expected, snapshot, tmp_path):
    wrong = [argument for argument in arguments if argument != "--append-eod"]
    assert command(*wrong, "--piece", "0/2").returncode == 0
    assert command(*arguments, "--piece", "1/2").returncode == 0
    before = snapshot(tmp_path / "out")
    for options in (arguments, wrong):
        joined = command(*options)
        assert joined.returncode == 2 and "made with another append eod" in joined.stderr and "of-2.jsonl" in joined.stderr
        assert snapshot(tmp_path / "out") == before
    joined = command(*arguments, "--overwrite")
    assert joined.returncode == 0 and "4 found done" in joined.stdout
    assert snapshot(tmp_path / "out") == expected


def test_a_part_of_the_right_size_and_other_bytes_is_made_again(command, arguments, expected, snapshot, tmp_path):
    """A part truncated by a power cut: parts are written without waiting for the disk."""
    assert command(*arguments, "--piece", "0/2").returncode == 0
    part = min((tmp_path / "out" / "set.parts").glob("*.bin"))
    part.write_bytes(bytes(part.stat().st_size))
    joined = command(*arguments)
    assert joined.returncode == 0 and "4 found done" in joined.stdout
    assert snapshot(tmp_path / "out") == expected


def test_shares_work_side_by_side_and_joining_waits_for_them(command, arguments, tmp_path):
    parts = tmp_path / "out" / "set.parts"
    parts.mkdir(parents=True)
    with alone(parts, (1, 2), show=True):
        assert "another run is writing" in command(*arguments).stderr
        assert "another run is writing" in command(*arguments, "--piece", "1/2").stderr
        assert command(*arguments, "--piece", "0/2").returncode == 0
    with alone(parts, None, show=True):
        assert "another run is writing" in command(*arguments, "--piece", "0/2").stderr


def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def flock(file, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path / "parts", (0, 2), show=True):
        assert capsys.readouterr().err.count("does not support locks (Function not implemented)") == 1


def test_on_nfs_shares_lock_and_the_folder_goes(corpus, byte_folder, expected, snapshot, tmp_path, monkeypatch, capsys):
    """On NFS flock is an fcntl lock, and a file removed while open blocks the removal of its folder."""
    def rmdir(path, **options):
        opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        if any(name.startswith(str(path)) for name in opened):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        original(path, **options)

    original = os.rmdir
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    monkeypatch.setattr(os, "rmdir", rmdir)
    for piece in ("0/2", "1/2", None):
        preprocess(PreprocessOptions(input=(str(corpus),), tokenizer_name_or_path=byte_folder, append_eod=True, piece_size=0.1,
                                     output_prefix=tmp_path / "out" / "set", piece=piece))
    assert "does not support locks" not in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == expected and not (tmp_path / "out" / "set.parts").exists()


@pytest.mark.parametrize("piece", ["3/3", "a/2", "1", "-1/2", "1/0"])
def test_wrong_shares_are_named(piece, tmp_path):
    options = PreprocessOptions(input=("x",), output_prefix=tmp_path / "x", tokenizer_name_or_path=tmp_path, piece=piece)
    with pytest.raises(ModelLinkError, match="it must be i/N"):
        preprocess(options)


@pytest.fixture(scope="module")
def two_nodes():
    """A Ray cluster of two nodes on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    if before is None:
        del os.environ["RAY_ADDRESS"]
    cluster.shutdown()


def test_same_bytes_on_a_cluster(two_nodes, command, arguments, expected, snapshot, tmp_path):
    done = command(*arguments, "--executor", "ray")
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "out") == expected


def test_a_piece_is_tried_again_where_its_process_died(two_nodes, corpus, byte_folder, expected, snapshot, tmp_path,
                                                       monkeypatch):
    def dies_once(folder, job, piece):  # inside the test, so that Ray sends it by value
        import os
        from pathlib import Path

        from modellink.data_prep.pieces import tokenize_piece

        if piece.index == 1 and not (mark := Path(folder) / "died").exists():
            mark.touch()
            os._exit(1)
        return tokenize_piece(job, piece)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modellink.data_prep.cluster._tokenize_there", dies_once)
    preprocess(PreprocessOptions(input=(str(corpus),), tokenizer_name_or_path=byte_folder, append_eod=True, piece_size=0.1,
                                 output_prefix=tmp_path / "out" / "set", executor="ray"), show=False)
    assert (tmp_path / "died").exists() and snapshot(tmp_path / "out") == expected


def test_a_bad_row_on_a_cluster_is_named(two_nodes, command, byte_folder, tmp_path, write_lines):
    write_lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": 1}])
    done = command("--input", "bad.jsonl", "--tokenizer-name-or-path", byte_folder, "--output-prefix", "out/set",
                   "--executor", "ray")
    assert done.returncode == 2 and "bad.jsonl, line 2" in done.stderr and "Traceback" not in done.stderr


def test_without_ray_it_is_said(corpus, byte_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelLinkError, match="Ray is not installed"):
        preprocess(PreprocessOptions(input=(str(corpus),), output_prefix=tmp_path / "out" / "x", executor="ray",
                                     tokenizer_name_or_path=byte_folder), show=False)
    assert not (tmp_path / "out").exists()
