"""What a run starts from: random weights, the weights of a checkpoint, or a run that is continued."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path

from modellink.ckpt_convert import open_checkpoint
from modellink.ckpt_convert.adapter import SAVED_FILE
from modellink.ckpt_convert.formats.huggingface import is_huggingface
from modellink.ckpt_convert.iterations import complete_iterations, iteration_folder, last_complete
from modellink.ckpt_convert.manifest import describes_itself
from modellink.ckpt_convert.peft_files import is_peft
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.config import CheckpointConfig, LoraConfig
from modellink.core.posttrain import adapters
from modellink.core.train.progress import Progress, read_progress
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, fields_of, resolve


@dataclass(frozen=True)
class Start:
    """`source` is the opened --load; of a run to go on with `resumed` is the iteration's folder, `progress` what stands there."""

    source: Checkpoint | None = None
    resumed: Path | None = None
    progress: Progress | None = None


def where_from(checkpoint: CheckpointConfig, lora: LoraConfig) -> tuple[CheckpointConfig, LoraConfig]:
    """The same, pointed at what --save holds where --auto-resume says so, and at nothing where --load is --save and empty."""
    save, load = checkpoint.save, checkpoint.load
    if checkpoint.auto_resume and save is not None and complete_iterations(save):
        checkpoint = replace(checkpoint, finetune=False, ckpt_step=None, load_optim=True, load_rng=True)  # those are of --load
        return (checkpoint, replace(lora, lora_load=save)) if lora.on else (replace(checkpoint, load=save), lora)
    if load is not None and load == save and (not load.exists() or not any(load.iterdir())):
        return replace(checkpoint, load=None), lora
    return checkpoint, lora


def find_start(config: CheckpointConfig, lora: LoraConfig) -> Start:
    """Open --load, and find the iteration to go on from where it (with adapters: --lora-load) holds a run.

    Raises:
        ModelLinkError: nothing there or damaged, or not what the options say of it.
    """
    start = _opened(config, lora)
    _check_save(config, start)
    return start


def _opened(config: CheckpointConfig, lora: LoraConfig) -> Start:
    if config.load is None:
        if lora.on:
            raise ModelLinkError("adapters learn what to add to weights, and there are none", where="--lora-target-modules",
                                 fix="give a checkpoint with --load")
        return Start()
    if not config.load.exists():
        raise ModelLinkError("the checkpoint to load is missing", where=f"--load {config.load}")
    if (config.load / SAVED_FILE).is_file():
        raise ModelLinkError("the checkpoint holds adapters alone", where=f"--load {config.load}",
                             fix="give it with --lora-load, and with --load what they were trained on")
    of_adapters = lora.on and lora.lora_load is not None  # then --ckpt-step is theirs
    if config.ckpt_step is not None and is_huggingface(config.load) and not of_adapters:
        raise ModelLinkError(f"iteration {config.ckpt_step} was asked for, and the folder has no iterations",
                             where=f"--ckpt-step, --load {config.load}", fix="leave it out")
    hf = None if describes_itself(config.load) else config.tokenizer_name_or_path
    source = open_checkpoint(config.load, family=config.model_type_hf, hf=hf,
                             iteration=None if of_adapters else config.ckpt_step)
    if lora.lora_load is not None:
        adapters.check(lora.lora_load, lora, source)
    if config.ckpt_step is not None and lora.lora_load is not None and is_peft(lora.lora_load):
        raise ModelLinkError("the adapters are a folder of peft, which has no iterations", where="--ckpt-step, --lora-load")
    if lora.on:
        continued = None if lora.lora_load is None or is_peft(lora.lora_load) else lora.lora_load
    else:
        continued = None if source.iteration is None else config.load
    if continued is None or config.finetune:
        return Start(source)
    folder = last_complete(continued, config.ckpt_step)
    progress = read_progress(folder)
    return Start(source) if progress is None else Start(source, folder, progress)


def _check_save(config: CheckpointConfig, start: Start) -> None:
    """A folder holds one run: a later iteration of another one would be what the next start takes."""
    if config.save is None:
        return
    begins = start.progress.iteration if start.progress else 0
    own = start.resumed is not None and start.resumed.parent.resolve() == config.save.resolve()
    later = [number for number in complete_iterations(config.save) if number > begins]
    if not later or (own and config.ckpt_step is None):
        return
    newest, where = config.save / iteration_folder(max(later)), f"--save {config.save}"
    if own:
        raise ModelLinkError(f"the folder to save in holds {newest.name}, which is later than iteration {config.ckpt_step}",
                             where=f"--ckpt-step, {where}", fix="save elsewhere, or move the later ones away")
    raise ModelLinkError(f"the folder to save in holds {newest.name} of another run, and this one begins at iteration {begins}",
                         where=where, fix="continue it with --auto-resume or --load, save elsewhere, or move it away")


def check_continued(progress: Progress | None, folder: Path | None, *, load_optim: bool, distributed_optimizer: bool,
                    by_samples: bool, instruction: bool) -> None:
    """Raise where a run cannot be continued by one of these settings.

    Args:
        load_optim: its optimizer state is taken too.
        by_samples: the run is counted by samples.
        instruction: the run is fine-tuned on instruction data.
    """
    if progress is None:
        return
    if progress.instruction != instruction:
        kinds = ("pretraining on documents", "fine-tuning on instructions")
        raise ModelLinkError(f"the checkpoint is of a run of {kinds[progress.instruction]}, and this is {kinds[instruction]}: "
                             "its optimizer state, schedule and place in the data do not belong here", where=folder,
                             fix="take its weights alone with --finetune")
    if load_optim and progress.distributed_optimizer != distributed_optimizer:
        flag = "--use-distributed-optimizer" if progress.distributed_optimizer else "--no-use-distributed-optimizer"
        raise ModelLinkError("the distributed optimizer keeps its state in another form than the plain one, and the checkpoint "
                             f"was saved with {flag}", where=folder,
                             fix=f"continue with {flag}, which works at any layout, or take only the weights with --finetune")
    if progress.by_samples != by_samples:
        unit = "samples" if progress.by_samples else "iters"
        raise ModelLinkError(f"the run that is continued is counted by --train-{unit}", where=f"{folder}, --train-iters, "
                             "--train-samples", fix=f"give --train-{unit}, or take only the weights with --finetune")


def architecture(source: Checkpoint | None, layers: list[Layer]) -> ModelSpec:
    """That of the checkpoint, which options may repeat but not contradict, but for longer sequences; else that of the options."""
    if source is None:
        return resolve([ModelSpec], *layers)[ModelSpec]
    known, longest = source.spec.explicit(), source.spec.max_position_embeddings
    learned = source.spec.position_embedding_type == "learned_absolute"
    for layer in layers:
        for field in fields_of(ModelSpec):
            if layer.values.get(field.name) is None:
                continue
            value, theirs = field.convert(layer.values[field.name], layer.source), known[field.name]
            if field.name == "max_position_embeddings" and not (learned and value > theirs):  # not part of what a model is
                longest = max(longest, value)
                continue
            if value != theirs and not (isinstance(value, float) and isclose(value, theirs or 0.0, rel_tol=1e-6)):
                raise ModelLinkError(f"{field.flag} is {value} in {layer.source} and {theirs} in the checkpoint",
                                     where=f"{layer.source}, {source.folder}",
                                     fix="leave it out: the checkpoint says what it is" if layer.source == "command line" else
                                     "the checkpoint is of another model")
    return replace(source.spec, max_position_embeddings=longest)
