# SPDX-License-Identifier: Apache-2.0
"""Opening a checkpoint of any format, which is detected from the files in the folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modellink.ckpt_convert import lora, manifest, peft_files
from modellink.ckpt_convert.adapter import SAVED_FILE
from modellink.ckpt_convert.format import OpenRequest
from modellink.ckpt_convert.formats import formats
from modellink.ckpt_convert.formats.peft import open_peft, peft_folder
from modellink.ckpt_convert.iterations import FOLDER, TRACKER, last_complete
from modellink.ckpt_convert.megatron import model, ranks
from modellink.ckpt_convert.source import Checkpoint
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import incomplete


def open_checkpoint(path: Path | str, *, family: str | None = None, hf: Path | str | None = None,
                    iteration: int | None = None, lora_r: int | None = None, lora_alpha: float | None = None,
                    adapter: bool = False) -> Checkpoint:
    """Open a checkpoint of any format; no weight is read yet. A checkpoint with weights and an adapter is
    opened merged.

    Args:
        path: the folder; of a checkpoint with iterations also the folder of one iteration.
        family: the model family, if the configuration does not name it.
        hf: a Hugging Face folder with config.json and tokenizer, for a checkpoint that has none.
        iteration: which iteration. Default: the last complete one.
        lora_r, lora_alpha: of an adapter in a Megatron checkpoint that does not record them.
        adapter: also open a LoRA adapter without its model (`Checkpoint.adapter` is set then).

    Raises:
        ModelLinkError: the folder is missing, not recognized, damaged or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise ModelLinkError("the checkpoint folder is missing", where=path)
    if not path.is_dir():
        raise ModelLinkError("a checkpoint is a folder, but this is a file", where=path)
    request = OpenRequest(path, path, path, family, Path(hf) if hf else None, iteration, lora_r, lora_alpha,
                          adapter)
    for form in formats():
        if not form.iterations and form.recognize(path):
            return form.open(request)
    root, folder = _iteration(path, iteration)
    for form in formats():
        if form.iterations and form.recognize(folder):
            return form.open(replace(request, root=root, folder=folder))
    raise _unrecognized(folder)


def open_adapter(path: Path | str, base: Checkpoint, *, r: int | None = None,
                 alpha: float | None = None) -> Checkpoint:
    """Open a LoRA adapter of the model `base`: a peft folder, a Megatron checkpoint in any layout, or the
    --save folder of modellink-train. Its prompt type is the one it was trained with, if that is recorded.

    Args:
        path: the folder; of a Megatron checkpoint that also has weights, only the adapter is read.
        r, alpha: for a Megatron checkpoint that does not record them.

    Raises:
        ModelLinkError: there is no adapter, it does not fit the model, or its scale is unknown.
    """
    path = Path(path)
    if (inside := peft_folder(path, None)) is not None:
        found = open_peft(inside, base)
        assert found.adapter is not None
        for name, mine, theirs in (("--lora-r", r, found.adapter.r),
                                   ("--lora-alpha", alpha, found.adapter.alpha)):
            if mine is not None and mine != theirs:
                raise ModelLinkError(f"{name} is {mine:g}, but {theirs:g} in the adapter",
                                     where=f"{name}, {inside / peft_files.CONFIG}")
        return found
    if not path.is_dir():
        raise ModelLinkError("the adapter's folder is missing", where=path)
    root, folder = _iteration(path, None)
    if not ranks.is_megatron(folder):
        evidence = f"{peft_files.CONFIG} (peft), mp_rank_* (Megatron) and {SAVED_FILE} (modellink-train)"
        raise ModelLinkError("no adapter was recognized", where=path, fix=f"looked for {evidence}")
    read = model.read(folder, base.spec)
    if not read.adapter:
        raise ModelLinkError("it has no LoRA tensors", where=path)
    config = lora.config_of(read.arguments, read.adapter, r, alpha, path)
    described = manifest.read_manifest(root)
    return Checkpoint(read.kind, path, base.spec, base.family, base.companions, read.adapter, read.layout,
                      adapter=config, prompt_type=described.prompt_type if described else None)


def _iteration(path: Path, iteration: int | None) -> tuple[Path, Path]:
    """Return (folder of the checkpoint, folder of the iteration to read)."""
    if any(form.iterations and form.recognize(path) for form in formats()):
        inside = FOLDER.match(path.name) or path.name == "release"
        root = path.resolve().parent if inside else path
        if inside and manifest.read_manifest(root) and (reason := incomplete(path)):
            raise ModelLinkError(f"the checkpoint is not complete: {reason}", where=path)
        return root, path
    if (path / TRACKER).is_file() or any(path.glob("iter_*")):
        return path, last_complete(path, iteration, ours=manifest.describes_itself(path))
    raise _unrecognized(path)


def _unrecognized(path: Path) -> ModelLinkError:
    evidence = ", ".join(form.evidence for form in formats() if form.evidence)
    return ModelLinkError("no checkpoint was recognized", where=path, fix=f"looked for {evidence}")
