# SPDX-License-Identifier: Apache-2.0
"""Builds step.c with the system's C compiler, once per processor and compiler, and loads it.

The library is kept in the user's cache folder (XDG_CACHE_HOME, else ~/.cache). Without a compiler, core's
model runs all passes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from modellink.kernels.files import atomic_write

SOURCE = Path(__file__).with_name("step.c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-shared", "-w")
I64, PTR = ctypes.c_int64, ctypes.c_void_p


class Matrix(ctypes.Structure):
    _fields_ = [("data", PTR), ("scale", PTR)]


class Layer(ctypes.Structure):
    _fields_ = [(name, PTR) for name in ("norm1", "norm2", "bias")] + [
        (name, Matrix) for name in ("qkv", "proj", "fc1", "fc2")] + [("keys", PTR), ("values", PTR)]


class Model(ctypes.Structure):
    _fields_: ClassVar[Any] = [(name, I64) for name in (
        "layers", "hidden", "heads", "groups", "dim", "ffn", "rotary", "interleaved", "gelu", "weights",
        "cache", "vocab")] + [
        ("epsilon", ctypes.c_float), ("scale", ctypes.c_float), ("layer", ctypes.POINTER(Layer)),
        ("norm", PTR), ("head", Matrix)]


@cache
def step() -> ctypes.CDLL | None:
    """Return the compiled step; None if there is no compiler or MODELLINK_NATIVE=0 is set."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("MODELLINK_NATIVE") == "0":
        return None
    try:
        path = _build(compiler)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: the user has no home folder
        return None
    library.step.argtypes = [ctypes.POINTER(Model), I64, PTR, PTR, PTR, PTR, PTR, PTR, PTR, I64, PTR, I64,
                             PTR, PTR, I64]
    library.step.restype = None
    return library


def _build(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True,
                             timeout=60).stdout
    known = "\0".join((SOURCE.read_text(encoding="utf-8"), version, *FLAGS, _processor(), torch.__version__))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modellink"
    path = folder / f"step-{hashlib.sha256(known.encode()).hexdigest()[:20]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            # link the OpenMP library of torch: another one would start a second set of threads on the same
            # cores
            torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
            subprocess.run([compiler, *FLAGS, "-fopenmp", torch_libraries, str(SOURCE), "-o", file.name,
                            "-lm"],
                           capture_output=True, check=True, timeout=300)
    return path


def _processor() -> str:
    """Return a text that identifies what `-march=native` depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()
