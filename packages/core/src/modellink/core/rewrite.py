# SPDX-License-Identifier: Apache-2.0
"""The import hook that rewrites CUDA names in the source of megatron-core; see engine.py for the rules.

Rewriting and compiling takes about two seconds, so the code is kept next to Python's own .pyc files.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import struct
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink.kernels.files import atomic_write

RULES = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"
"""Changes with this file, so that code rewritten by other rules is not used."""


class Rewrite(ast.NodeTransformer):
    """Rewrites CUDA names to those of `device`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name("_accel", node.ctx), node)
        if node.attr == "is_cuda":
            node.attr = f"is_{self.device}"
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        self.generic_visit(node)
        if self.device == "cpu" and node.arg == "pin_memory":
            node.value = ast.copy_location(ast.Constant(False), node.value)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if node.value == "cuda":
            return ast.copy_location(ast.Constant(self.device), node)
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.rstrip(", ").endswith("Tensor"):
            own = "torch." if self.device == "cpu" else f"torch.{self.device}."
            return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", own)), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)  # `.cuda(` remaining after this is a method of a tensor or module
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            call = ast.parse("x.to(_accel.current_device())", mode="eval").body
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            call.func.value = node.func.value
            for part in (call, call.func, call.args[0], *ast.walk(call.args[0])):
                ast.copy_location(part, node)  # tracebacks keep megatron's line numbers
            return call
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        if node.module != "torch.cuda":
            return node
        names = [ast.parse(f"{name.asname or name.name} = _accel.{name.name}").body[0] for name in node.names]
        return [ast.fix_missing_locations(ast.copy_location(name, node)) for name in names]


class Loader(importlib.machinery.SourceFileLoader):
    device: str
    namespace: Any

    def get_code(self, fullname: str) -> types.CodeType:  # Python's own .pyc file holds the code as shipped
        path = self.get_filename(fullname)
        cached, stats = self._cached(path), self.path_stats(path)
        header = importlib.util.MAGIC_NUMBER + struct.pack("<2Q", *(int(stats[name]) for name in ("mtime", "size")))
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
            data = cached.read_bytes()
            if data.startswith(header):
                code: types.CodeType = marshal.loads(data[len(header):])
                return code
        source = self.get_data(path)
        tree = ast.parse(source)
        if b"cuda" in source:
            tree = ast.fix_missing_locations(Rewrite(self.device).visit(tree))
        code = compile(tree, path, "exec", dont_inherit=True)
        with contextlib.suppress(OSError):  # the environment may be read-only
            cached.parent.mkdir(exist_ok=True)
            with atomic_write(cached, durable=False) as file:
                file.write(header + marshal.dumps(code))
        return code

    def _cached(self, path: str) -> Path:
        """The file next to Python's own .pyc file that keeps the rewritten code; another name for other rules."""
        return Path(importlib.util.cache_from_source(path, optimization=f"modellink{self.device}{RULES}"))

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["_accel"] = self.namespace
        super().exec_module(module)
        if module.__name__ == "megatron.core.jit":
            # it would apply torch.compile to functions that kernels.ops replaces: loading the compiler takes seconds at every
            # start, and calling such a function needs a C++ compiler
            module.disable_jit_fuser()


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, device: str, namespace: Any) -> None:
        self.device, self.namespace = device, namespace

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
            spec.loader.device, spec.loader.namespace = self.device, self.namespace
        return spec
