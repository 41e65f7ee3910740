# SPDX-License-Identifier: Apache-2.0
"""The schemas of the npu operators we call, in every version of torch_npu that versions.txt names.

    python schemas.py              download the wheels and write schemas.json again
    python schemas.py --check      the same, and fail if schemas.json says otherwise

A wheel holds them as text; nothing of it is installed or imported. `problem` says whether a call fits one, without torch_npu.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VERSIONS = HERE.joinpath("versions.txt").read_text("utf-8").split()
FILE = HERE / "schemas.json"
OPERATORS = ("npu_all_gather_base_mm", "npu_apply_adam_w.out", "npu_fusion_attention", "npu_fusion_attention_grad",
             "npu_grouped_matmul", "npu_mm_all_reduce_base", "npu_mm_reduce_scatter_base", "npu_ring_attention_update",
             "npu_rms_norm", "npu_rotary_mul", "npu_swiglu")
INSIDE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
ALSO = {"Tensor": ("Tensor", "Tensor?"), "int": ("int", "int?", "float", "Scalar", "SymInt"), "float": ("float", "Scalar"),
        "bool": ("bool", "bool?"), "str": ("str", "str?"), "Tensor[]": ("Tensor[]",), "int[]": ("int[]", "int[]?")}
"""What a schema may call an argument that is given a value of a type."""


def in_wheel(wheel: Path) -> dict[str, str]:
    """The schema of each operator we call that a wheel has."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(INSIDE).decode()
    found = {}
    for line in re.findall(r"^[ -]*func: *(?:npu::)?(.+?) *$", text, re.M):
        name = line.partition("(")[0]
        if name in OPERATORS:  # several tensors to write to are registered as one list
            found[name] = re.sub(r"\*, Tensor\(a!\) .*\) -> .*", "*, Tensor[] out) -> (Tensor, Tensor, Tensor)", line)
    return found


def download(version: str, folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version",
                    "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--platform",
                    "manylinux_2_17_x86_64", "--dest", str(folder), f"torch-npu=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def collect(versions: Sequence[str] = VERSIONS) -> dict[str, dict[str, list[str]]]:
    """{operator: {schema: versions that have it}}, from the wheels."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in OPERATORS}
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            for name, schema in in_wheel(download(version, Path(folder))).items():
                found[name].setdefault(schema, []).append(version)
    return found


def known() -> dict[str, dict[str, str]]:
    """{version: {operator: schema}}, from schemas.json."""
    found: dict[str, dict[str, str]] = {version: {} for version in VERSIONS}
    for name, schemas in json.loads(FILE.read_text("utf-8")).items():
        for schema, versions in schemas.items():
            for version in versions:
                found[version][name] = schema
    return found


def problem(schema: str, positional: Sequence[str], named: Mapping[str, str]) -> str | None:
    """Why a call with arguments of these types does not fit, None where it does."""
    import torch

    arguments = torch._C.parse_schema(f"npu::{schema}").arguments
    by_name = {argument.name: argument for argument in arguments}
    places = [argument for argument in arguments if not argument.kwarg_only]
    if len(positional) > len(places):
        return f"{len(positional)} arguments by position, it has {len(places)}"
    given: list[tuple[Any, str]] = list(zip(places, positional, strict=False))
    for name, kind in named.items():
        if name not in by_name:
            return f"no argument {name}"
        if by_name[name] in places[:len(positional)]:
            return f"argument {name} twice"
        given.append((by_name[name], kind))
    for argument, kind in given:
        wanted = spelling(argument)
        if not (wanted.endswith("?") if kind == "None" else wanted in ALSO[kind]):
            return f"{argument.name} is a {wanted}, given {kind}"
    missing = [argument.name for argument in arguments if not argument.has_default_value()
               and not any(argument is one for one, _ in given) and not spelling(argument).endswith("?")]
    return f"{', '.join(missing)} missing" if missing else None


def spelling(argument: Any) -> str:
    """The type of a schema's argument as schemas spell it."""
    text = str(argument.type)
    optional = text.startswith("Optional[")
    text = text.removeprefix("Optional[").removesuffix("]") if optional else text
    text = re.sub(r"^List\[(.+)\]$", r"\1[]", text)
    return {"number": "Scalar", "number[]": "Scalar[]"}.get(text, text) + "?" * optional


if __name__ == "__main__":
    now = json.dumps(collect(), indent=1) + "\n"
    if "--check" in sys.argv:
        sys.exit(0 if now == FILE.read_text("utf-8") else f"{FILE.name} is not what the wheels hold")
    FILE.write_text(now, "utf-8")
