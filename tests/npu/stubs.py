# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the libraries of CANN that torch_npu links to, so that the wheel loads where neither CANN nor an NPU is.

    python stubs.py FOLDER_WITH_torch_npu OUTPUT

Memory, streams and events are host_runtime.c. Every operator that the wheel can call is a function that fails with a status of
its own: a call's arguments have then passed all that torch_npu checks itself, and no result is ever made up. Needs gcc and nm.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

RUNTIME = Path(__file__).with_name("host_runtime.c")
LIBRARIES = ("libascendcl.so", "libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so",
             "libopapi.so")
NO_OPERATOR, NO_FUNCTION = 561000, 500000
# Makers and enders of descriptions of tensors and attributes: they have nothing to do, and no status.
NOTHING = {"aclCreateDataBuffer", "aclCreateTensorDesc", "aclopCreateAttr", "aclAppLog", "aclopDestroyAttr",
           "aclDestroyTensorDesc", "aclDestroyDataBuffer"}
HANDLES = ("Tensor", "Scalar", "IntArray", "FloatArray", "BoolArray", "TensorList", "ScalarList")


def undefined(library: Path) -> set[str]:
    """Functions of CANN that a library wants from others."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines() if " U " in line}
    return {name for name in names if re.match(r"(acl[A-Za-z]|Hccl|rt[A-Z]|Msprof)", name)}


def operators(library: Path) -> set[str]:
    """Return the operators that are looked up at run time: their names are strings in the library."""
    names = {name.decode() for name in re.findall(rb"\0(aclnn[A-Z]\w+)(?=\0)", library.read_bytes())}
    return names | {name if name.endswith("GetWorkspaceSize") else f"{name}GetWorkspaceSize" for name in names}


def functions(names: Iterable[str], status: int) -> str:
    """C: functions of any name, each of which gives back a status."""
    return "".join(f'long f{number}_{status}(void) __asm__("{name}");\n'
                   f"long f{number}_{status}(void) {{ return {0 if name in NOTHING else status}; }}\n"
                   for number, name in enumerate(sorted(names)))


def compile(folder: Path, name: str, source: str, *more: str) -> None:
    """Make a shared library of C."""
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-x", "c", "-", "-x", "none", *more, f"-Wl,-soname,{name}", "-o",
                    str(folder / name)], input=source, text=True, check=True)


def make(wheel: Path, folder: Path) -> None:
    """All libraries, for the wheel unpacked in `wheel`."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = wheel / "torch_npu"
    main = inside / "lib" / "libtorch_npu.so"
    linked = [main, inside / "lib" / "libtensorpipe.so", inside / "lib" / "libnpu_profiler.so", *inside.glob("_C*.so")]
    written = set(re.findall(r"^[a-z_ *]+?\**(acl\w+)\(", RUNTIME.read_text(), re.M))
    wanted = set().union(*(undefined(library) for library in linked)) - written
    compile(folder, "libascendcl.so", functions(wanted, NO_FUNCTION), "-x", "c", str(RUNTIME))
    for name in LIBRARIES[1:-1]:  # what is looked up in any of them is found in the first
        compile(folder, name, "", "-Wl,--no-as-needed", f"-L{folder}", "-lascendcl")
    handles = "#include <stdlib.h>\n" + "".join(
        f"void *aclCreate{name}(void) {{ return malloc(8); }}\nint aclDestroy{name}(void *handle) {{ free(handle); return 0; }}\n"
        for name in HANDLES)
    compile(folder, "libopapi.so", handles + functions(operators(main), NO_OPERATOR))


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
