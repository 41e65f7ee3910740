"""Opening a checkpoint of any supported format by looking at what is in the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modellink.ckpt_convert import lora, manifest
from modellink.ckpt_convert.adapter import SAVED_FILE, SAVED_FOLDER
from modellink.ckpt_convert.families import NO_FORM, ORIGINALS_BASE, read_spec
from modellink.ckpt_convert.formats import huggingface, megatron, peft, ranks, torch_dist
from modellink.ckpt_convert.formats.tensors import Assembled
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.iterations import FOLDER, TRACKER, last_complete
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import incomplete, read_json
from modellink.kernels.parallel import ParallelLayout


def open_checkpoint(path: Path | str, *, family: str | None = None, hf: Path | str | None = None,
                    iteration: int | None = None, lora_r: int | None = None, lora_alpha: float | None = None,
                    adapter: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a Megatron-Core or a torch_dist checkpoint; no weight is read yet.

    Args:
        path: the folder; of a Megatron checkpoint also one of its iterations.
        family: the family where the configuration does not say it.
        hf: a Hugging Face folder with config.json and tokenizer, for a Megatron checkpoint that does not carry its own.
        iteration: which iteration; the last complete one where nothing is said.
        lora_r, lora_alpha: of an adapter in a Megatron checkpoint that does not say them.
        adapter: what is found may be a LoRA adapter without its model (`Checkpoint.adapter` is set then).

    A checkpoint with weights and an adapter is opened merged.

    Raises:
        ModelLinkError: there is nothing, or nothing known, or it is damaged or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise ModelLinkError("the checkpoint folder is missing", where=path)
    if not path.is_dir():
        raise ModelLinkError("a checkpoint is a folder, this is a file", where=path)
    if iteration is not None and (huggingface.is_huggingface(path) or peft.is_peft(path)):
        raise ModelLinkError(f"iteration {iteration} was asked for, and the folder has no iterations", where=path,
                             fix="leave it out")
    if huggingface.is_huggingface(path):
        return huggingface.open_folder(path, family)
    if (folder := _peft_folder(path, iteration)) is not None:
        if not adapter:
            raise _is_adapter(path)
        carried = folder.parent.parent / manifest.FOLDER
        base = Path(hf) if hf else carried if folder != path and (carried / "config.json").is_file() else None
        return _open_peft(folder, family, base)
    root, folder = _iteration(path, iteration)
    if not (torch_dist.is_torch_dist(folder) or ranks.is_megatron(folder)):
        raise _unrecognised(folder)
    description = _description(root, family, Path(hf) if hf else None)
    tensors: Mapping[str, Assembled]
    beside: Mapping[str, Assembled] = {}
    if torch_dist.is_torch_dist(folder):
        kind, layout = "torch_dist", ParallelLayout()
        tensors = torch_dist.read(folder, description.spec)
    else:
        found = megatron.read(folder, description.spec)
        kind, tensors, layout, beside = found.kind, found.tensors, found.layout, found.adapter
    match = FOLDER.match(folder.name)
    made = Checkpoint(kind, path, description.spec, description.family, description.companions, tensors, layout,
                      int(match[1]) if match else None, description.prompt_type)
    if not beside:
        return made
    if not (tensors or adapter):
        raise _is_adapter(path)
    config = lora.config_of(found.arguments, beside, lora_r, lora_alpha, path)
    return lora.merge_lora(made, config, beside) if tensors else replace(made, tensors=beside, adapter=config)


def _is_adapter(path: Path) -> ModelLinkError:
    return ModelLinkError("this is a LoRA adapter without its model", where=path,
                          fix="give the base model, and this with --lora-load")


def _open_peft(folder: Path, family: str | None, hf: Path | None) -> Checkpoint:
    """An adapter folder; which model it belongs to is said by the user, or by its configuration where that names a folder."""
    named = read_json(folder / peft.CONFIG)
    base = hf or Path(str(named.get("base_model_name_or_path") if isinstance(named, dict) else None))
    if not (base / "config.json").is_file():
        raise ModelLinkError("the adapter does not say which model it belongs to", where=folder,
                             fix="give --tokenizer-name-or-path, the Hugging Face folder of the base model")
    spec, family = read_spec(Config.load(base), family)
    config, tensors = peft.read(folder, spec, family)
    return Checkpoint("peft adapter", folder, spec, family, base, tensors, adapter=config, prompt_type=_trained_with(folder))


def _peft_folder(path: Path, iteration: int | None) -> Path | None:
    """The folder of peft that `path` is, or that lies in what modellink-train saved of adapters there."""
    if peft.is_peft(path):
        return path
    if (path / SAVED_FILE).is_file():
        path = last_complete(path, iteration, ours=True)
    return path / SAVED_FOLDER if peft.is_peft(path / SAVED_FOLDER) else None


def _trained_with(folder: Path) -> str | None:
    """The prompt type of a folder of peft inside an iteration of modellink-train."""
    inside = folder.resolve()
    if inside.name != SAVED_FOLDER or not FOLDER.match(inside.parent.name):
        return None
    found = manifest.read_manifest(inside.parents[1])
    return found.prompt_type if found else None


def open_adapter(path: Path | str, base: Checkpoint, *, r: int | None = None, alpha: float | None = None) -> Checkpoint:
    """Open a LoRA adapter of the model `base`: a folder of peft, a Megatron checkpoint in any layout, or the --save folder of
    modellink-train. Its prompt type is the one it was trained with, where that is known.

    Args:
        path: the folder; of a Megatron checkpoint that holds weights too, only the adapter is taken.
        r, alpha: where a Megatron checkpoint does not say them.

    Raises:
        ModelLinkError: there is no adapter, it does not fit the model, or its scale is not known.
    """
    path = Path(path)
    if (inside := _peft_folder(path, None)) is not None:
        config, tensors = peft.read(inside, base.spec, base.family)
        for name, mine, theirs in (("--lora-r", r, config.r), ("--lora-alpha", alpha, config.alpha)):
            if mine is not None and mine != theirs:
                raise ModelLinkError(f"{name} is {mine:g} and {theirs:g} in the adapter", where=f"{name}, {inside / peft.CONFIG}")
        return Checkpoint("peft adapter", inside, base.spec, base.family, base.companions, tensors, adapter=config,
                          prompt_type=_trained_with(inside))
    if not path.is_dir():
        raise ModelLinkError("the adapter's folder is missing", where=path)
    root, folder = _iteration(path, None)
    if not ranks.is_megatron(folder):
        raise ModelLinkError("no adapter was recognised", where=path,
                             fix=f"looked for {peft.CONFIG} (peft), mp_rank_* (Megatron) and {SAVED_FILE} (modellink-train)")
    found = megatron.read(folder, base.spec)
    if not found.adapter:
        raise ModelLinkError("there is no LoRA tensor in it", where=path)
    config = lora.config_of(found.arguments, found.adapter, r, alpha, path)
    described = manifest.read_manifest(root)
    return Checkpoint(found.kind, path, base.spec, base.family, base.companions, found.adapter, found.layout, adapter=config,
                      prompt_type=described.prompt_type if described else None)


def _iteration(path: Path, iteration: int | None) -> tuple[Path, Path]:
    """(the checkpoint's folder, the folder of the iteration to read)."""
    if torch_dist.is_torch_dist(path) or ranks.is_megatron(path):
        inside = FOLDER.match(path.name) or path.name == "release"
        root = path.resolve().parent if inside else path
        if inside and manifest.read_manifest(root) and (reason := incomplete(path)):
            raise ModelLinkError(f"the checkpoint is not complete: {reason}", where=path)
        return root, path
    if (path / TRACKER).is_file() or any(path.glob("iter_*")):
        ours = (path / manifest.FILE).is_file()
        return path, last_complete(path, iteration, ours=ours)
    raise _unrecognised(path)


def _unrecognised(path: Path) -> ModelLinkError:
    return ModelLinkError(
        "no checkpoint was recognised", where=path,
        fix=f"looked for {huggingface.SINGLE}, {huggingface.PICKLED} or their index (Hugging Face), {TRACKER} or iter_* with "
        f"mp_rank_* (Megatron-Core) or {torch_dist.METADATA} (torch_dist)")


@dataclass(frozen=True)
class _Description:
    spec: ModelSpec
    family: str
    companions: Path
    prompt_type: str | None


def _description(root: Path, family: str | None, hf: Path | None) -> _Description:
    """What a Megatron checkpoint is, from its manifest, or from the Hugging Face folder the user names."""
    found = manifest.read_manifest(root)
    companions = hf or root / manifest.FOLDER
    if hf is not None and not (hf / "config.json").is_file():
        raise ModelLinkError("the folder has no config.json", where=f"{hf}, --tokenizer-name-or-path",
                             fix="give a Hugging Face folder with config.json and the tokenizer")
    if found is None:
        if not (companions / "config.json").is_file():
            raise ModelLinkError(f"the checkpoint does not say which model it is ({manifest.FILE} and "
                                 f"{manifest.FOLDER}/config.json are missing)", where=root, fix=f"give {manifest.HELP}")
        spec, family = read_spec(Config.load(companions), family)
        return _Description(spec, family, companions, None)
    if family not in (None, ORIGINALS_BASE, found.family):
        raise ModelLinkError(f"the checkpoint is of the family {found.family}, not {family}",
                             where=f"{root / manifest.FILE}, --model-type-hf")
    if found.family != NO_FORM and (companions / "config.json").is_file():
        config = Config.load(companions)
        theirs, _ = read_spec(config, found.family)
        found.spec.refuse_contradiction(theirs, str(root / manifest.FILE), str(config.path))
    return _Description(found.spec, found.family, companions, found.prompt_type)
