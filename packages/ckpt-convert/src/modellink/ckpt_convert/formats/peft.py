# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as peft folders; also the ones that modellink-train saves in its iterations.

Not here: the files (peft_files.py) and what they contain (peft.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modellink.ckpt_convert import manifest, peft, peft_files
from modellink.ckpt_convert.adapter import SAVED_FILE, SAVED_FOLDER
from modellink.ckpt_convert.families import read_spec
from modellink.ckpt_convert.format import Format, OpenRequest, WriteRequest
from modellink.ckpt_convert.formats import register
from modellink.ckpt_convert.formats.megatron import no_model
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.iterations import FOLDER, last_complete
from modellink.ckpt_convert.peft_files import is_peft
from modellink.ckpt_convert.plan import ConversionPlan, PlannedFile
from modellink.ckpt_convert.source import Checkpoint
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json, write_json
from modellink.kernels.parallel import ParallelLayout


@register
class Peft(Format):
    name = "peft"
    title = "peft adapter"
    evidence = f"{peft_files.CONFIG} (peft)"
    weights = False
    adapters = True
    names_its_model = False

    def recognize(self, folder: Path) -> bool:
        if is_peft(folder) or is_peft(folder / SAVED_FOLDER):
            return True
        return (folder / SAVED_FILE).is_file() and any(is_peft(path / SAVED_FOLDER)
                                                       for path in folder.glob("iter_*"))

    def open(self, request: OpenRequest) -> Checkpoint:
        if is_peft(request.path):
            request.refuse_iteration()
        folder = peft_folder(request.path, request.iteration)
        if folder is None:
            raise ModelLinkError("the iteration has no peft adapter", where=request.path)
        if not request.adapter:
            raise no_model(request.path)
        base = request.hf
        carried = folder.parent.parent / manifest.FOLDER
        if base is None and folder != request.path and (carried / "config.json").is_file():
            base = carried
        return _open(folder, request.family, base)

    def plan(self, source: Checkpoint, request: WriteRequest) -> ConversionPlan:
        assert source.adapter is not None
        layout, config = peft.planned(source.spec, source.family, source.tensors, source.adapter,
                                      base=str(source.companions), dtype=request.dtype)
        return ConversionPlan(source, self.name, self.title, ParallelLayout(),
                              request.dtype or source.main_dtype, (PlannedFile(peft_files.WEIGHTS, layout),),
                              {peft_files.CONFIG: config})

    def write_companions(self, plan: ConversionPlan, folder: Path, described: manifest.Manifest,
                         config: Mapping[str, Any]) -> None:
        for name, content in plan.json_files.items():
            write_json(folder / name, content)


def peft_folder(path: Path, iteration: int | None) -> Path | None:
    """Return the peft folder that `path` is, or the one in an iteration that modellink-train saved in `path`."""
    if is_peft(path):
        return path
    if (path / SAVED_FILE).is_file():
        path = last_complete(path, iteration, ours=True)
    return path / SAVED_FOLDER if is_peft(path / SAVED_FOLDER) else None


def _open(folder: Path, family: str | None, hf: Path | None) -> Checkpoint:
    """Open an adapter whose model the user names, or its configuration if that names a folder."""
    values = read_json(folder / peft_files.CONFIG)
    named = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    base = hf or Path(str(named))
    if not (base / "config.json").is_file():
        raise ModelLinkError("the adapter does not tell which model it belongs to", where=folder,
                             fix="give --tokenizer-name-or-path, the Hugging Face folder of the base model")
    spec, family = read_spec(Config.load(base), family)
    config, tensors = peft_files.read(folder, spec, family)
    return Checkpoint(Peft.title, folder, spec, family, base, tensors, adapter=config,
                      prompt_type=trained_with(folder))


def trained_with(folder: Path) -> str | None:
    """Return the prompt type of a peft folder in an iteration of modellink-train, if it is recorded."""
    inside = folder.resolve()
    if inside.name != SAVED_FOLDER or not FOLDER.match(inside.parent.name):
        return None
    found = manifest.read_manifest(inside.parents[1])
    return found.prompt_type if found else None


def open_peft(folder: Path, base: Checkpoint) -> Checkpoint:
    """Open a peft folder as an adapter of the model `base`."""
    config, tensors = peft_files.read(folder, base.spec, base.family)
    return Checkpoint(Peft.title, folder, base.spec, base.family, base.companions, tensors, adapter=config,
                      prompt_type=trained_with(folder))
