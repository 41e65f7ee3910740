# SPDX-License-Identifier: Apache-2.0
"""The import arrows between the packages and, inside each package, between its floors; every import is read with `ast`.

Between packages: kernels <- ckpt-convert <- core <- infer <- eval, with data-prep next to them. "At import time" means outside
functions and outside `if TYPE_CHECKING`. Inside a package late imports count too: a folder or top-level module imports only from
itself and from lower floors. Not covered: imports made from strings (entry points).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from arrows import circles, folder_arrows, imports, module_arrows, modules, unit  # noqa: E402

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
NOT_AT_IMPORT = {name: {"torch_npu", *({"torch"} if name in ("ckpt_convert", "data_prep", "eval") else ())}
                 for name in ARROWS}
# What one module may import in a function, because an extra brings it.
EXTRAS = {"modellink.ckpt_convert.verify_model": {"transformers"}}
# In kernels only these import torch at import time; whoever imports them at import time needs torch as well.
TORCH_MODULES = ("modellink.kernels.ops", "modellink.kernels.device")
WITHOUT_TORCH = ("kernels", "data_prep", "eval")


# The folders and top-level modules of each package from top to bottom. Names on one floor do not import each other; the package's
# own `__init__` and command line are on the roof. A package that is missing here is reported as skipped.
FLOORS: dict[str, tuple[str, ...]] = {
    "kernels": ("doctor", "command", "general_options | model_options | ops",
                "device | files | options | original | parallel | progress",
                "owner",
                "constants | errors | plugins | svg | tables",
                "dependency_warnings | messages | terminal"),
    "ckpt_convert": (
        "__main__",
        "cli",
        "convert",
        "verify_model | replicas",
        "streams",
        "inspect | open | options",
        "formats",
        "format",
        "peft | plan | verify",
        "lora_targets | peft_files",
        "megatron",
        "lora",
        "blocks",
        "source",
        "families",
        "family",
        "hf_config | manifest | rules",
        "weights",
        "spec",
        "adapter | iterations | layer | storage",
    ),
    "core": (
        "cli",
        "models | repeatability",
        "api",
        "methods",
        "prepare | resilience",
        "train",
        "adapters | memory",
        "model",
        "data",
        "parallel | profiling",
        "profile_summary | run",
        "presets | processes",
        "engine",
        "adam | rewrite",
        "determinism | digests | launch",
        "config",  # and plan, which needs no torch either
    ),
    "data_prep": (
        "cli",
        "inspection | preprocess",
        "cluster | merge | packing | plan",
        "options | parts",
        "pieces",
        "handlers | detokenize",
        "inputs | templates",
        "readers | tokenizer",
        "engines | histogram | indexed | tables",
        "rows",
    ),
    "infer": (
        "cli",
        "chat | launch | original | printing | prompt_input | server",
        "engine | options",
        "batch | beam | plan | prompts | score",
        "network",
        "fast_paths",
        "graphs | native",
        "passes",
        "attention",
        "arguments | cache | sampler",
        "constraint | pages | request | template",
        "grammar | sampling | text",
    ),
    "eval": (
        "cli",
        "runner",
        "kinds | report",
        "journal",
        "job | options",
        "prompts",
        "backends | data | recorded",
        "examples",
        "rows | sandbox | score | taskfile",
        "task",
    ),
}


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
    files = modules(package)
    assert files, f"no modules of {package} found"
    found = [problem for module, path in files.items()
             for problem in problems(package, module, path.read_text("utf-8"), path.name == "__init__.py")]
    assert not found, "\n" + "\n".join(found)


def levels(floors: tuple[str, ...]) -> dict[str, int]:
    """Return the height of every folder and top-level module; the lowest floor is 1."""
    found = {name: height for height, floor in enumerate(reversed(floors), 1) for name in floor.split(" | ")}
    return found | {"__init__": len(floors) + 1}


def upward(arrows: dict[str, set[str]], floors: tuple[str, ...]) -> Iterator[str]:
    """Yield a line for each arrow between modules that does not lead to the own folder or a lower floor."""
    height = levels(floors)
    for module, targets in sorted(arrows.items()):
        for target in sorted(targets):
            own, other = unit(module), unit(target)
            if own != other and height[own] <= height[other]:
                yield f"{module} (floor {height[own]}) imports {target} (floor {height[other]})"


@pytest.mark.parametrize("package", ARROWS)
def test_imports_go_down_the_floors(package: str) -> None:
    arrows = module_arrows(modules(package))
    names = {name for floor in FLOORS[package] for name in floor.split(" | ")}
    assert names == set(folder_arrows(arrows)) - {"__init__"}, "every folder and module has a floor, and every name exists"
    found = list(upward(arrows, FLOORS[package]))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("package", ARROWS)
def test_there_is_no_import_circle(package: str) -> None:
    arrows = module_arrows(modules(package))
    assert circles(folder_arrows(arrows)) == []
    assert circles(arrows) == []


def test_an_upward_import_and_a_circle_are_found(tmp_path: Path) -> None:
    sources = {"__init__": "from modellink.toy.top import run", "top": "from modellink.toy import low",
               "low": "def f():\n    from modellink.toy.top import run", "kind.a": "from .b import x",
               "kind.b": "from . import a",
               "kind.__init__": "if TYPE_CHECKING:\n    from modellink.toy import top"}
    for name, source in sources.items():
        path = tmp_path / "packages/toy/src/modellink/toy" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    arrows = module_arrows(modules("toy", tmp_path))
    assert circles(arrows) == [["modellink.toy.kind.a", "modellink.toy.kind.b"], ["modellink.toy.low", "modellink.toy.top"]]
    assert circles(folder_arrows(arrows)) == [["low", "top"]]
    assert folder_arrows(arrows)["kind"] == set()
    assert list(upward(arrows, ("top", "kind | low"))) == ["modellink.toy.low (floor 1) imports modellink.toy.top (floor 2)"]
    assert list(upward(arrows, ("low", "kind | top"))) == ["modellink.toy.top (floor 1) imports modellink.toy.low (floor 2)"]


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
