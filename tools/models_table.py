# SPDX-License-Identifier: Apache-2.0
"""Fill the table of models in core's README from test results: `python tools/models_table.py`.

It runs the tests that say something about a model row and reads their outcomes; no cell is typed. A row's cells about
computing come from the tiny model of its family that has the same features (every field of ModelSpec that is no size).
All six packages and the test needs of core and ckpt-convert must be installed; takes about two minutes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.families import read_spec
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import parameters, weights
from modellink.core.presets import Preset, load_preset, preset_names

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests/support"))

from ranks import beside  # noqa: E402

README, CORE, CONVERT = ROOT / "packages/core/README.md", ROOT / "packages/core/tests", ROOT / "packages/ckpt-convert/tests"
FILES = [CONVERT / "test_public.py", CONVERT / "test_layouts.py", CORE / "test_parity.py", CORE / "test_preset_builds.py",
         CORE / "test_presets.py"]
TABLE = re.compile(r"(<!-- models -->\n).*?(<!-- end of models -->)", re.DOTALL)
SIZES = {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "norm_epsilon",
         "ffn_hidden_size", "num_query_groups", "kv_channels", "rotary_base", "moe_intermediate_size", "first_k_dense_replace",
         "moe_router_topk"}
COLUMNS = {"TP": "tp2", "PP": "pp2", "VPP": "vpp2", "EP": "ep2", "CP": "cp2"}
HEAD = ["model", "parameters", "config", "convert both ways", "logits, gradients", *COLUMNS, "preset builds"]
Results = Mapping[tuple[str, str], bool]


def features(spec: ModelSpec) -> dict[str, Any]:
    """What a model has, without how large it is."""
    found = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in SIZES:
            found[field.name] = value if isinstance(value, (bool, str)) else value != field.default
    return found


def tensors(spec: ModelSpec) -> set[str]:
    """Which weights a model has, without the numbers of layers and experts: all that a conversion sees of it."""
    return {re.sub(r"\d+", "N", name) for name in weights(spec)}


def results() -> Results:
    """(test, what it was run with) -> whether it passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *map(str, FILES)], cwd=ROOT, check=False,
                       stdout=subprocess.DEVNULL)
        found: dict[tuple[str, str], bool] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name, _, rest = case.get("name", "").partition("[")
            found[name, rest.removesuffix("]")] = not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
    return found


def tiny_models() -> Iterator[tuple[str, str, ModelSpec]]:
    """(case of the parity tests, family, spec)."""
    import transformers

    models = beside(str(CORE / "x.py"), "models")
    for case in models.cases():
        if case in models.TRANSFORMERS:
            name, values = models.TRANSFORMERS[case]
            config = getattr(transformers, f"{name}Config")(**values).to_dict()
        else:
            family, variant = case.split(": ")
            config = models.reference(family).TINY[variant]
        spec, family = read_spec(Config(config, Path(case)))
        yield case, family, spec


def converted_models() -> Iterator[tuple[str, str, ModelSpec]]:
    """(model of the converter's layout tests, family, spec)."""
    tiny = beside(str(CONVERT / "x.py"), "tiny_models")
    for name, (family, values) in tiny.MODELS.items():
        yield name, family, ModelSpec(**values)


def alike(preset: Preset, models: list[tuple[str, str, ModelSpec]], what: Callable[[ModelSpec], Any]) -> str | None:
    return next((name for name, family, spec in models if family == preset.family and what(spec) == what(preset.spec)), None)


def row(preset: Preset, passed: Results, tiny: list[Any], converted: list[Any]) -> list[str]:
    def said(test: str, *arguments: str | None) -> str:
        if None in arguments:
            return "none alike"
        outcomes = [good for (name, what), good in passed.items() if name == test and (
            what == "-".join(arguments) or (len(arguments) == 1 and what.startswith(f"{arguments[0]}-")))]  # type: ignore[arg-type]
        return "no test" if not outcomes else "yes" if all(outcomes) else "FAILED"

    parity = "test_logits_and_gradients_equal_the_reference"
    config = f"n/a: {preset.public_missing}" if preset.public is None else said(
        "test_its_tensors_are_those_of_another_source", preset.public)
    if preset.public and not json.loads((CONVERT / f"public/{preset.public}.json").read_text(encoding="utf-8"))["verified"]:
        config = "unverified"
    cells = [preset.name, f"{parameters(preset.spec):,}", config]
    if preset.family is None:
        cells += ["n/a: no Hugging Face form"] + ["n/a"] * (1 + len(COLUMNS))
    else:
        case = alike(preset, tiny, features)
        cells += [said("test_there_and_back", alike(preset, converted, tensors)), said(parity, case, "tp1")]
        cells += ["no experts" if column == "EP" and not preset.spec.num_experts else said(parity, case, layout)
                  for column, layout in COLUMNS.items()]
    return [*cells, said("test_a_preset_builds_at_its_layout", preset.name)]


def main() -> int:
    passed, tiny, converted = results(), list(tiny_models()), list(converted_models())
    rows = [row(load_preset(name), passed, tiny, converted) for name in preset_names()]
    lines = ["| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * len(HEAD), *rows]]
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text), encoding="utf-8")
    bad = [(cells[0], HEAD[column], cell) for cells in rows for column, cell in enumerate(cells)
           if cell in ("FAILED", "no test", "none alike")]
    for name, column, cell in bad:
        print(f"{name}: {column}: {cell}")
    print(f"{len(rows)} rows, {len(bad)} cells without a passed test")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
