# SPDX-License-Identifier: Apache-2.0
"""The import arrows inside each package: `python tools/arrows.py [PACKAGE ...]` prints an arrow per line and marks circles.

The nodes are the folders and top-level modules of a package; `tests/test_import_arrows.py` compares the arrows with a table of
floors. Imports inside functions count, imports under `if TYPE_CHECKING` do not. Not covered: imports made from strings (entry
points).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "ckpt_convert", "data_prep", "core", "infer", "eval")

Arrows = dict[str, set[str]]


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    at_import: bool
    is_base: bool = False
    """Whether this is the `a` of `from a import b`."""


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Yield every import of a module, relative ones made absolute; `from a import b` yields `a` and `a.b`."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            yield Import(base, node.lineno, at_import, is_base=True)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.expr):  # expressions contain no imports
                    yield from visit(child, at_import and not late)

    yield from visit(ast.parse(source), True)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


@cache
def imports_of(path: Path, module: str) -> tuple[Import, ...]:
    """Return the imports of the module in a file, which is read once."""
    return tuple(imports(path.read_text("utf-8"), module, path.name == "__init__.py"))


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """Return the file of every module of a package, by dotted name."""
    source = root / "packages" / package.replace("_", "-") / "src"
    found = {}
    for path in sorted((source / "modellink").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def module_arrows(files: Mapping[str, Path]) -> Arrows:
    """Return, for each module, the modules of the same package that it imports.

    `from a import b` is an arrow to `a.b` where that is a module, else to `a`. The `__init__` files that Python runs on the
    way to a module are not counted.
    """
    arrows: Arrows = {}
    for module, path in files.items():
        names = [item.name for item in imports_of(path, module) if not item.is_base]
        targets = [name if name in files else name.rpartition(".")[0] for name in names]
        arrows[module] = {target for target in targets if target in files} - {module}
    return arrows


def unit(module: str) -> str:
    """Return the folder or top-level module that a module belongs to; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else "__init__"


def folder_arrows(arrows: Mapping[str, set[str]]) -> Arrows:
    """Combine the arrows between modules to arrows between folders and top-level modules."""
    found: Arrows = {unit(module): set() for module in arrows}
    for module, targets in arrows.items():
        found[unit(module)] |= {unit(target) for target in targets} - {unit(module)}
    return found


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that import each other, directly or over others (the strongly connected components)."""
    reach = {node: _reachable(node, arrows) for node in arrows}
    found: list[list[str]] = []
    for node in sorted(arrows):
        group = sorted(other for other in reach[node] if node in reach.get(other, ()))
        if group and group not in found:
            found.append(group)
    return found


def _reachable(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in arrows.get(todo.pop(), ()):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def main() -> int:
    status = 0
    for package in sys.argv[1:] or PACKAGES:
        between_modules = module_arrows(modules(package))
        arrows = folder_arrows(between_modules)
        groups = circles(arrows)
        for node, targets in sorted(arrows.items()):
            for target in sorted(targets):
                in_circle = any(node in group and target in group for group in groups)
                print(f"{package}: {node} -> {target}{'   CIRCLE' if in_circle else ''}")
        for group in [*groups, *circles(between_modules)]:
            print(f"{package}: CIRCLE of {', '.join(group)}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
