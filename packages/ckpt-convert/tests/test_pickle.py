# SPDX-License-Identifier: Apache-2.0
"""Our reader of torch.save files: equal to torch on valid files, without effect on hostile ones, one error on damaged ones."""

from __future__ import annotations

import builtins
import collections
import enum
import errno
import io
import os
import pickle
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from modellink.ckpt_convert.storage import archive
from modellink.ckpt_convert.storage.pickle import Inert, Reader, read_archive
from modellink.ckpt_convert.storage.tensors import Stored, as_bytes
from modellink.ckpt_convert.storage.writing import Planned, write
from modellink.kernels.errors import ModelLinkError


class Kind(enum.Enum):
    A = 1


class Evil:
    """Its pickle requests a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def planned(tensor: torch.Tensor) -> Planned:
    """Return a tensor to be written, in blocks of one row."""
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: iter(tensor.split(1)))


def save(path: Path, value: Any) -> dict[str, str]:
    with open(path, "wb") as file, ThreadPoolExecutor(3) as pool:
        return write(file.fileno(), archive.layout(value), pool, lambda count: None, path)


def whole(stored: Stored) -> torch.Tensor:
    return stored.read(range(stored.shape[0]), range(stored.columns)).view(stored.shape)


def test_tensors_equal_those_of_torch(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    state = {"whole": base, "view": base[2:5], "half": torch.randn(3, 5).bfloat16(), "vector": torch.arange(7),
             "parameter": torch.nn.Parameter(torch.randn(2, 2)), "empty": torch.zeros(0, 3)}
    torch.save(state, tmp_path / "x.pt")
    for name, stored in read_archive(tmp_path / "x.pt").items():
        assert torch.equal(whole(stored), state[name].detach()), name
    assert torch.equal(read_archive(tmp_path / "x.pt")["whole"].read(range(1, 3), range(2, 4)), base[1:3, 2:4])


def test_a_window_of_a_larger_file(tmp_path: Path) -> None:
    body = io.BytesIO()
    torch.save(torch.arange(12.0).view(3, 4), body)
    (tmp_path / "x").write_bytes(b"before!" + body.getvalue() + b"after" * 99)
    assert torch.equal(whole(read_archive(tmp_path / "x", 7, len(body.getvalue()))), torch.arange(12.0).view(3, 4))


def test_unknown_objects_become_inert(tmp_path: Path) -> None:
    state = {"args": Namespace(kind=Kind.A, dtype=torch.bfloat16, path=Path("x"), layers=3),
             "rng": np.random.RandomState(1).get_state(), "file": io.BytesIO(b"abc"), "default": collections.defaultdict(list)}
    torch.save(state, tmp_path / "x.pt")
    args = read_archive(tmp_path / "x.pt")["args"]
    assert isinstance(args, Inert) and args.name == "argparse.Namespace"
    assert args.state["layers"] == 3 and args.state["dtype"] == "bfloat16" and isinstance(args.state["kind"], Inert)


@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.exec, builtins.getattr, builtins.__import__, os.unlink])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_runs_nothing(function: Any, protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    argument = str(victim) if function is os.unlink else f"__import__('os').unlink({str(victim)!r})"
    argument = f"rm {victim}" if function is os.system else argument
    evil = pickle.dumps({"model": Evil(function, argument)}, protocol)
    found = Reader(io.BytesIO(evil)).load()
    assert isinstance(found["model"], Inert) and found["model"].args == (argument,)
    assert victim.exists()


HOSTILE_CODE = {
    "call of a result": b"cos\nsystem\n(S'touch VICTIM'\ntR(tR.",
    "build on a class": b"cos\nsystem\n}S'x'\nI1\nsb.",
    "old instance": b"(S'touch VICTIM'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch VICTIM'\no.",
    "dotted name": b"\x80\x04\x8c\x02os\x8c\x0esystem.__call__\x93\x8c\x0ctouch VICTIM\x85R.",
    "extension": b"\x82\x01.",
    "attribute of a safe function": b"\x80\x04\x8c\x0ccollections\x8c\x1fOrderedDict.__init__.__globals__\x93.",
}


@pytest.mark.parametrize("case", HOSTILE_CODE)
def test_hostile_opcodes_run_nothing(case: str, tmp_path: Path) -> None:
    victim = tmp_path / "VICTIM"
    code = HOSTILE_CODE[case].replace(b"VICTIM", str(victim).encode()) if case != "dotted name" else HOSTILE_CODE[case]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as made:
        made.writestr("archive/data.pkl", code)
    try:
        read_archive(tmp_path / "x.pt")
    except ModelLinkError as error:  # an error is as good as an inert object
        assert str(tmp_path / "x.pt") in str(error)
    assert not victim.exists() and not Path("VICTIM").exists()


@pytest.mark.parametrize("arguments", [
    (0, (9, 9), (9, 1)), (5, (2, 2), (2, 1)), (-1, (1, 1), (1, 1)), (0, (2, 2), (3, 2)), (0, (-2, 2), (2, 1)),
    ("0", (2, 2), (2, 1))])
def test_a_tensor_stays_within_its_storage(arguments: Any, tmp_path: Path) -> None:
    """Sizes, offsets and strides beyond the storage."""
    torch.save(torch.zeros(6), tmp_path / "honest.pt")
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(6).untyped_storage(), dtype=torch.float32, _internal=True)

    class Lying:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, *arguments, False, collections.OrderedDict())

    torch.save(Lying(), tmp_path / "x.pt")
    with pytest.raises(ModelLinkError, match=r"storage|row-major"):
        read_archive(tmp_path / "x.pt")


def test_a_storage_stays_within_its_record(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", planned(torch.zeros(4)))
    data = (tmp_path / "x.pt").read_bytes()
    count = b"K\x04tq"  # 4, then the end of the tuple that names the storage
    assert data.count(count) == 1
    (tmp_path / "x.pt").write_bytes(data.replace(count, b"K\x40tq"))
    with pytest.raises(ModelLinkError, match="64 elements"):
        read_archive(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 10, 500, -40, -1])
def test_a_file_that_was_cut_off(keep: int, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:keep])
    with pytest.raises(ModelLinkError, match=r"not a complete torch.save archive"):
        read_archive(tmp_path / "x.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ModelLinkError, match="is compressed"):
        read_archive(tmp_path / "y.pt")


def test_a_damaged_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02}q\x00(X\x01")
    with pytest.raises(ModelLinkError, match="its pickle cannot be read"):
        read_archive(tmp_path / "x.pt")


def test_our_writer_is_read_by_torch_and_repeats_itself(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(9).bfloat16(), "c": torch.randn(3).half()}
    value = {"args": Namespace(dtype=torch.bfloat16), "model": {name: planned(tensor) for name, tensor in tensors.items()}}
    assert save(tmp_path / "x.pt", value) == save(tmp_path / "y.pt", value) == {
        f"model.{name}": xxhash.xxh3_64_hexdigest(as_bytes(tensor)) for name, tensor in tensors.items()}
    for mmap in (False, True):
        found = torch.load(tmp_path / "x.pt", weights_only=False, mmap=mmap)
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()
    assert all(stored.offset % archive.ALIGNMENT == 0 for stored in read_archive(tmp_path / "x.pt")["model"].values())
    with zipfile.ZipFile(tmp_path / "x.pt") as read:
        assert read.testzip() is None  # the CRC of every record


def test_records_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Write the archive's fixed bytes to a file with holes for the tensors."""
    large = Planned(torch.float32, (1 << 15, (1 << 15) + 1), lambda: iter(()))
    layout = archive.layout({"first": large, "second": planned(torch.arange(3.0))})
    with open(tmp_path / "x.pt", "wb") as file:
        file.truncate(layout.size)
        for offset, content in [*layout.fixed, (layout.slots[1].offset, torch.arange(3.0).numpy().tobytes())]:
            file.seek(offset)
            file.write(content)
    found = torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)
    assert found["first"].shape == large.shape and torch.equal(found["second"], torch.arange(3.0))
    with zipfile.ZipFile(tmp_path / "x.pt") as read:
        assert read.getinfo("archive/data/0").file_size == large.nbytes > 1 << 32
    assert torch.equal(whole(read_archive(tmp_path / "x.pt")["second"]), torch.arange(3.0))


def test_a_full_disk_is_an_error_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelLinkError, match="the disk has no space"):
        save(tmp_path / "x.pt", planned(torch.zeros(4)))
