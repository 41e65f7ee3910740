# SPDX-License-Identifier: Apache-2.0
"""How every package writes files: completely or not at all.

A file is written under a temporary name in its own folder, flushed, fsynced and renamed. A folder of many
files is written as `NAME.tmp`, gets a marker with its files and their sizes, and is then renamed; a folder
without a valid marker is not complete. A journal is a file of JSON lines that survives being killed in the
middle of a line.

Not here: the formats of the files, and that each output has one writer (owner.py).
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.owner import owned

MARKER = "modellink.complete"
SYNC_FILE_RANGE_WRITE = 2  # from linux/fs.h: start writing dirty pages, do not wait


def kill_point(name: str) -> None:
    """Kill this process, like a power cut, if `MODELLINK_KILL_AT` names this point; tests check what is left
    on disk."""
    if os.environ.get("MODELLINK_KILL_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def sync(path: Path) -> None:
    """fsync a file or a folder (a rename changes the folder)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def start_writeback(handle: int, offset: int, count: int) -> bool:
    """Start writing back bytes that were already written, so that a later fsync has little to wait for.

    This calls Linux' sync_file_range(2), which Python does not have. Returns whether it was accepted; nothing
    depends on it.
    """
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    return begin is not None and not begin(
        handle, ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(SYNC_FILE_RANGE_WRITE))


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb", *, durable: bool = True) -> Iterator[IO[Any]]:
    """Open `path` for writing; it appears with its full content when the block ends, and not at all if it
    raises.

    Args:
        durable: wait until it is on the disk. False is only for files whose checksum is stored elsewhere: a
            crash of the process still leaves no partial file, but a power cut may.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        kill_point("after-write")
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path | str) -> None:
    """Delete temporary files of killed `atomic_write(path)` calls; no other process may be writing `path`."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        ModelLinkError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLinkError("a file is missing", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLinkError(f"not a JSON file: {error}", where=path) from None


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raise a ModelLinkError if `path` exists and is not an empty folder; with `overwrite` it may exist."""
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not overwrite and not empty:
        raise ModelLinkError("the output exists", where=path,
                             fix="choose another name, remove it, or pass --overwrite")


@contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False, keep: bool = False,
                  wait: bool = False) -> Iterator[Path]:
    """Yield the new folder `path.tmp`; when the block ends it is marked complete and renamed to `path`.

    Args:
        overwrite: replace an existing `path`.
        keep: keep an unfinished `path.tmp` of an earlier run, for work that resumes.
        wait: wait for another process that writes `path` instead of refusing.

    Raises:
        ModelLinkError: `path` exists, or another process is writing it.
    """
    path = Path(path)
    with owned(path, wait=wait):
        refuse_existing(path, overwrite=overwrite)
        temporary = path.with_name(path.name + ".tmp")
        if temporary.exists() and not keep:
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        finish_folder(temporary, path)


def mark_complete(folder: Path) -> None:
    """fsync every file in `folder`, and write the marker that lists them."""
    sizes = {}
    for file in sorted(folder.rglob("*")):
        sync(file)
        if file.is_file() and file.name != MARKER:
            sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    write_json(folder / MARKER, {"files": sizes})


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename the finished folder `temporary` to `path`, replacing an existing one."""
    kill_point("before-rename")
    if path.exists():
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    sync(path.parent)


def finish_folder(temporary: Path, path: Path) -> None:
    """Mark `temporary` complete and rename it to `path`, replacing an existing folder."""
    kill_point("after-write")
    mark_complete(temporary)
    move_into_place(temporary, path)


def incomplete(path: Path) -> str | None:
    """Return why the folder `path` is not complete, or None if its marker and all files listed there are
    present."""
    marker = path / MARKER
    if not marker.is_file():
        return f"it has no {MARKER}, so writing it did not finish"
    try:
        sizes: Mapping[str, int] = dict(read_json(marker)["files"])
    except (ModelLinkError, KeyError, TypeError, ValueError):
        return f"its {MARKER} is damaged"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


class Journal:
    """A file of JSON lines that records finished work, and is read when the work resumes.

    A last line that was truncated by a kill is dropped when the journal is opened.

    Attributes:
        entries: what the file held when it was opened; appended entries are not kept in memory.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.entries: list[Any] = []
        good = 0
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.entries.append(json.loads(line))
                except ValueError:
                    raise ModelLinkError(
                        f"line {len(self.entries) + 1} is not JSON", where=self.path,
                        fix="this is not one of our journals; remove it or choose another output") from None
                good += len(line)
        self._file = open(self.path, "ab")
        self._file.truncate(good)

    def append(self, *entries: object) -> None:
        """Record `entries`; they are on disk when this returns."""
        for entry in entries:
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
