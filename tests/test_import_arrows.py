"""The arrows between the packages: reads every import of every module by `ast` and fails on one the table does not have.

The way they point: kernels <- ckpt-convert <- core <- infer <- eval, with data-prep beside. "At import
time" means outside functions and outside `if TYPE_CHECKING`. Not covered: imports made from strings (entry points).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Which siblings a package may import at import time, and which only inside functions.
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "ckpt_convert": {"kernels"},
    "data_prep": {"kernels"},
    "core": {"kernels", "ckpt_convert"},
    "infer": {"kernels", "ckpt_convert", "data_prep", "core"},
    "eval": {"kernels", "data_prep"},
}
LATE_ARROWS = {"eval": {"infer", "core"}}  # its [local] extra brings both

# Heavy packages that may not be imported anywhere in a package, and those that may not be at import time.
NEVER = {
    "kernels": {"megatron", "transformers"},
    "ckpt_convert": {"megatron", "transformers"},
    "data_prep": {"torch", "megatron", "transformers"},
    "core": {"transformers"},
    "infer": {"transformers"},
    "eval": {"megatron", "transformers"},
}
NOT_AT_IMPORT = {name: {"torch_npu", *({"torch"} if name in ("data_prep", "eval") else ())} for name in ARROWS}
# What one module may import in a function, because an extra brings it.
EXTRAS = {"modellink.ckpt_convert.verify_model": {"transformers"}}
# In kernels only these import torch at import time; whoever imports them at import time needs torch as well.
TORCH_MODULES = ("modellink.kernels.ops", "modellink.kernels.device")
WITHOUT_TORCH = ("kernels", "data_prep", "eval")


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    at_import: bool


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, relative ones made absolute; `from a import b` yields `a` and `a.b`."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            yield Import(base, node.lineno, at_import)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not late)

    yield from visit(ast.parse(source), True)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def problems(package: str, module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, as lines to print."""
    found = []
    for item in imports(source, module, is_package):
        top, *rest = item.name.split(".")
        here = f"{module}:{item.line} imports {item.name}"
        if top == "modellink" and rest and rest[0] in ARROWS and rest[0] != package:
            if rest[0] not in ARROWS[package] | LATE_ARROWS.get(package, set()):
                found.append(f"{here}: {package} may not import {rest[0]}")
            elif item.at_import and rest[0] not in ARROWS[package]:
                found.append(f"{here}: only inside a function, {rest[0]} is optional for {package}")
        extra = EXTRAS.get(module, set())
        if top in NEVER[package] - extra:
            found.append(f"{here}: {package} never imports {top}")
        if item.at_import and top in NOT_AT_IMPORT[package] | extra:
            found.append(f"{here}: {top} only inside a function")
        if package in WITHOUT_TORCH and item.at_import and not within(module, TORCH_MODULES):
            if within(item.name, TORCH_MODULES):
                found.append(f"{here}: that module imports torch, so only inside a function")
            elif package == "kernels" and top == "torch":
                found.append(f"{here}: in kernels only ops/ and device.py import torch at import time")
    return found


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_table(package: str) -> None:
    source = ROOT / "packages" / package.replace("_", "-") / "src"
    found, seen = [], 0
    for path in sorted((source / "modellink").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += problems(package, module, path.read_text("utf-8"), is_package)
        seen += 1
    assert seen, f"no module below {source}"
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("kernels", "modellink.kernels.files", "from modellink.core import engine"),
        ("kernels", "modellink.kernels.files", "import torch"),
        ("kernels", "modellink.kernels.doctor", "from .ops import rms_norm"),
        ("kernels", "modellink.kernels.doctor", "from . import device"),
        ("ckpt_convert", "modellink.ckpt_convert.plan", "def f():\n    import transformers"),
        ("ckpt_convert", "modellink.ckpt_convert.plan", "try:\n    import megatron.core\nexcept ImportError:\n    pass"),
        ("ckpt_convert", "modellink.ckpt_convert.verify_model", "import transformers"),
        ("data_prep", "modellink.data_prep.cli", "from modellink.kernels.device import Device"),
        ("data_prep", "modellink.data_prep.cli", "def f():\n    from torch import nn"),
        ("core", "modellink.core.engine", "import torch_npu"),
        ("core", "modellink.core.engine", "import modellink.infer"),
        ("eval", "modellink.eval.cli", "from modellink import infer"),
        ("eval", "modellink.eval.cli", "class A:\n    import torch"),
    ],
)
def test_a_wrong_arrow_is_found(package: str, module: str, source: str) -> None:
    assert problems(package, module, source)


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("eval", "modellink.eval.backends.local", "def f():\n    from modellink.infer import load"),
        ("eval", "modellink.eval.cli", "from modellink.data_prep import tokenizer"),
        ("data_prep", "modellink.data_prep.cli", "if TYPE_CHECKING:\n    import torch\n    import modellink.kernels.device"),
        ("kernels", "modellink.kernels.ops.swiglu", "import torch\nfrom ..device import Device\ndef f():\n    import torch_npu"),
        ("core", "modellink.core.engine", "import torch\nfrom modellink.ckpt_convert.spec import ModelSpec"),
    ],
)
def test_a_right_arrow_passes(package: str, module: str, source: str) -> None:
    assert problems(package, module, source) == []
