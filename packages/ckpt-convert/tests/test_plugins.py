# SPDX-License-Identifier: Apache-2.0
"""A checkpoint format and a model family of another distribution, used by `modellink-convert` with none of our files changed.

The distribution is a folder on sys.path with two modules and a dist-info, whose entry points name them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FORMAT = '''
"""Every weight in its own file of raw numbers, with an index."""

import json

from modellink.ckpt_convert import blocks, manifest
from modellink.ckpt_convert.format import Format
from modellink.ckpt_convert.formats import register
from modellink.ckpt_convert.plan import ConversionPlan, PlannedFile
from modellink.ckpt_convert.source import Checkpoint, assemble
from modellink.ckpt_convert.storage.tensors import Part, Stored, dtype_name
from modellink.ckpt_convert.storage.writing import FileLayout, Slot
from modellink.ckpt_convert.weights import weights
from modellink.kernels.files import write_json
from modellink.kernels.parallel import ParallelLayout


@register
class Raw(Format):
    name = "raw"
    title = "raw files"
    evidence = "raw.json (raw files)"

    def recognize(self, folder):
        return (folder / "raw.json").is_file()

    def open(self, request):
        request.refuse_iteration()
        folder, described, parts = request.path, manifest.read_manifest(request.path), {}
        for name, entry in json.loads((folder / "raw.json").read_text()).items():
            stored = Stored(folder / entry["file"], 0, entry["dtype"], tuple(entry["shape"]))
            parts[name] = [Part(stored, range(stored.shape[0]), range(stored.columns), (0, 0))]
        tensors = assemble(described.spec, parts, folder)
        return Checkpoint(self.title, folder, described.spec, described.family, folder / "hf", tensors)

    def plan(self, source, request):
        files, index = [], {}
        for number, (name, weight) in enumerate(weights(source.spec).items()):
            planned = blocks.shard(source, name, weight, request.dtype or source.dtype(name), tp=1, rank=0)
            files.append(PlannedFile(f"{number}.bin", FileLayout(planned.nbytes, (), (Slot(name, 0, planned),))))
            index[name] = {"file": f"{number}.bin", "dtype": dtype_name(planned.dtype), "shape": planned.shape}
        return ConversionPlan(source, self.name, self.title, ParallelLayout(), source.main_dtype, tuple(files),
                              {"raw.json": index})

    def write_companions(self, plan, folder, described, config):
        manifest.write_companions(folder, described, plan.source.companions)
        write_json(folder / "hf" / "config.json", config)
        for name, content in plan.json_files.items():
            write_json(folder / name, content)
'''
FAMILY = '''
"""A Llama whose layers have a window and a rotary base each."""

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family


@register
class Novel(Family):
    model_type = "novel"
    architecture = "NovelForCausalLM"

    def read(self, config):
        window, local = config.count("window"), float(config.need("local_rope_theta"))
        is_local = [kind == "local" for kind in config.need("layer_kinds")]
        values = super().read(config)
        return values | {"layer_windows": tuple(window if short else 0 for short in is_local),
                         "layer_rotary_bases": tuple(local if short else values["rotary_base"] for short in is_local)}

    def write(self, spec):
        local = next(layer for layer in spec.layers if layer.window)
        kinds = ["local" if layer.window else "global" for layer in spec.layers]
        return super().write(spec) | {"layer_kinds": kinds, "window": local.window, "local_rope_theta": local.rope.base}
'''
CONFIG = {"architectures": ["NovelForCausalLM"], "model_type": "novel", "window": 7, "local_rope_theta": 300.0,
          "layer_kinds": ["local", "global", "local", "global"]}


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "their_format.py").write_text(FORMAT)
    (folder / "their_family.py").write_text(FAMILY)
    info = folder / "their_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[modellink.formats]\nraw = their_format\n\n[modellink.families]\nnovel = their_family\n")
    return folder


@pytest.fixture
def model(make_model: Callable[..., Path]) -> dict[str, torch.Tensor]:
    """The weights of a model of that family, in the folder `hf`."""
    return load_file(make_model("llama", name="hf", **CONFIG) / "model.safetensors")


def command(distribution: Path, *arguments: object, module: str = "modellink.ckpt_convert") -> subprocess.CompletedProcess[str]:
    paths = [str(distribution), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


def test_a_format_and_a_family(distribution: Path, model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    steps = [("hf", "raw", ()), ("raw", "megatron-core", ("--tp", 3)),
             ("megatron-core", "back", ("--verify", "--no-verify-model"))]
    for source, target, options in steps:
        form = "hf" if target == "back" else target
        done = command(distribution, tmp_path / source, tmp_path / target, "--to", form, *options)
        assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == model.keys() and all(torch.equal(after[name], tensor) for name, tensor in model.items())
    described = command(distribution, "inspect", tmp_path / "raw", "--json")
    facts = json.loads(described.stdout)
    assert (facts["format"], facts["family"]) == ("raw files", "novel")
    assert facts["spec"]["layer_windows"] == [7, 0, 7, 0]
    assert facts["spec"]["layer_rotary_bases"] == [300.0, 5000.0, 300.0, 5000.0]


def test_the_format_is_suggested_and_listed(distribution: Path, model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    done = command(distribution, tmp_path / "hf", tmp_path / "x", "--to", "rwa")
    assert done.returncode == 2 and "did you mean raw?" in done.stderr
    assert "|peft|torch-dist|raw]" in command(distribution, "--help").stdout
    done = command(distribution, tmp_path, tmp_path / "x", "--to", "hf")
    assert "raw.json (raw files)" in done.stderr


def test_without_the_distribution(model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    done = command(tmp_path, tmp_path / "hf", tmp_path / "x", "--to", "raw")
    assert done.returncode == 2 and "--to is 'raw'" in done.stderr
    done = command(tmp_path, tmp_path / "hf", tmp_path / "x", "--to", "megatron-core")
    assert done.returncode == 2 and "unknown model type 'novel'" in done.stderr


def test_a_broken_distribution_is_named(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modellink.formats]\nbroken = no_such_module\n")
    done = command(tmp_path, "a", "b", "--to", "hf")
    assert done.returncode == 2 and "the checkpoint folder is missing" in done.stderr, "the other formats still work"
    assert "note: broken of modellink.formats (no_such_module) is not available: ModuleNotFoundError" in done.stderr
