# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: random weights, the weights of a checkpoint, or a run to resume."""

from __future__ import annotations

import os
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
from modellink.core.config import CheckpointConfig, LoraConfig, OptimizerConfig, ParallelConfig
from modellink.core.train.progress import Progress, changes, read_progress
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, fields_of, resolve
from modellink.kernels.owner import owner_file


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        source: the opened checkpoint of --load; None for random weights.
        resumed: folder of the iteration to resume from.
        progress: of that iteration.
    """

    source: Checkpoint | None = None
    resumed: Path | None = None
    progress: Progress | None = None

    @property
    def resumed_run(self) -> Path | None:
        """The folder of the run to resume."""
        return None if self.resumed is None else self.resumed.parent.resolve()


def resolve_start(checkpoint: CheckpointConfig, lora: LoraConfig) -> tuple[CheckpointConfig, LoraConfig]:
    """Point both at the run in --save for --auto-resume, and clear --load if it is the same empty folder as --save."""
    save, load = checkpoint.save, checkpoint.load
    if checkpoint.auto_resume and save is not None and complete_iterations(save):
        checkpoint = replace(checkpoint, finetune=False, ckpt_step=None, load_optim=True, load_rng=True)  # those are of --load
        return (checkpoint, replace(lora, lora_load=save)) if lora.on else (replace(checkpoint, load=save), lora)
    if load is not None and load == save and (not load.exists() or _is_empty(load)):
        return replace(checkpoint, load=None), lora
    return checkpoint, lora


def _is_empty(folder: Path) -> bool:
    return not set(folder.iterdir()) - {owner_file(folder, inside=True)}  # left by a run that was killed before its first save


def find_start(config: CheckpointConfig, lora: LoraConfig) -> Start:
    """Open --load and find the iteration to resume from, if --load (with adapters: --lora-load) holds a run.

    Raises:
        ModelLinkError: a checkpoint is missing or damaged, or contradicts the options.
    """
    start = _opened(config, lora)
    _check_save(config, start)
    return start


def _opened(config: CheckpointConfig, lora: LoraConfig) -> Start:
    if config.load is None:
        if lora.on:
            raise ModelLinkError("LoRA needs a base model: --load is not set", where="--lora-target-modules",
                                 fix="give a checkpoint with --load")
        return Start()
    _check_load(config.load)
    adapters, load = lora.lora_load if lora.on else None, config.load
    if config.ckpt_step is not None and is_huggingface(load) and adapters is None:
        raise ModelLinkError(f"--ckpt-step {config.ckpt_step} is set, but the folder has no iterations",
                             where=f"--ckpt-step, --load {load}", fix="remove --ckpt-step")
    hf = None if describes_itself(load) else config.tokenizer_name_or_path
    iteration = config.ckpt_step if adapters is None else None  # with --lora-load it selects the adapters
    source = open_checkpoint(load, family=config.model_type_hf, hf=hf, iteration=iteration)
    if adapters is not None:
        _check_adapters(adapters, config, lora, source)
    resumed = _folder_to_resume(load, lora, source)
    if resumed is None or config.finetune:
        return Start(source)
    folder = last_complete(resumed, config.ckpt_step)
    progress = read_progress(folder)
    return Start(source) if progress is None else Start(source, folder, progress)


def _check_load(load: Path) -> None:
    if not load.exists():
        raise ModelLinkError("the checkpoint to load is missing", where=f"--load {load}")
    if (load / SAVED_FILE).is_file():
        raise ModelLinkError("the checkpoint holds only adapters", where=f"--load {load}",
                             fix="give it with --lora-load, and with --load the model they were trained on")


def _check_adapters(folder: Path, config: CheckpointConfig, lora: LoraConfig, source: Checkpoint) -> None:
    from modellink.core.adapters import saved  # imports torch
    saved.check(folder, lora, source)
    if config.ckpt_step is not None and is_peft(folder):
        raise ModelLinkError("the adapters are a PEFT folder, which has no iterations", where="--ckpt-step, --lora-load")


def _folder_to_resume(load: Path, lora: LoraConfig, source: Checkpoint) -> Path | None:
    """The folder that may hold a run to resume."""
    if lora.on:
        return None if lora.lora_load is None or is_peft(lora.lora_load) else lora.lora_load
    return None if source.iteration is None else load


def _check_save(config: CheckpointConfig, start: Start) -> None:
    """A folder holds one run: the next start would resume from a later iteration of another one."""
    if config.save is None:
        return
    existing = next(path for path in (config.save, *config.save.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "may not be written" if existing.is_dir() else "is a file"
        raise ModelLinkError(f"--save cannot be created: {existing} {reason}", where=f"--save {config.save}",
                             fix="choose a folder that can be written", option="save")
    begins = start.progress.iteration if start.progress else 0
    own = start.resumed is not None and start.resumed.parent.resolve() == config.save.resolve()
    later = [number for number in complete_iterations(config.save) if number > begins]
    if not later or (own and config.ckpt_step is None):
        return
    newest, where = config.save / iteration_folder(max(later)), f"--save {config.save}"
    if own:
        raise ModelLinkError(f"--save contains {newest.name}, which is later than --ckpt-step {config.ckpt_step}",
                             where=f"--ckpt-step, {where}", fix="save to another folder, or move the later iterations away")
    raise ModelLinkError(f"--save contains {newest.name} of another run, and this run starts at iteration {begins}",
                         where=where, fix="resume it with --auto-resume or --load, save to another folder, or move it away")


def check_resumed(start: Start, method: str, checkpoint: CheckpointConfig, parallel: ParallelConfig,
                  optimizer: OptimizerConfig) -> None:
    """Raise ModelLinkError if a run cannot be resumed with these settings."""
    progress, folder = start.progress, start.resumed
    if progress is None:
        return
    if progress.method != method:
        raise ModelLinkError(f"the checkpoint is of a run of {progress.method}, this is {method}: its optimizer state, schedule "
                             "and position in the data do not apply", where=folder,
                             fix="load only its weights with --finetune")
    distributed = progress.distributed_optimizer
    if checkpoint.load_optim and distributed != parallel.use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if distributed else "--no-use-distributed-optimizer"
        raise ModelLinkError("the distributed optimizer stores its state in another form than the plain one, and the checkpoint "
                             f"was saved with {flag}", where=folder,
                             fix=f"resume with {flag}, which works at any layout, or load only the weights with --finetune")
    if progress.by_samples != optimizer.by_samples:
        unit = "samples" if progress.by_samples else "iters"
        raise ModelLinkError(f"the resumed run is measured by --train-{unit}", where=f"{folder}, --train-iters, --train-samples",
                             fix=f"give --train-{unit}, or load only the weights with --finetune")
    _check_precision(progress, folder, checkpoint, optimizer)
    chosen = optimizer.override_opt_param_scheduler or optimizer.use_checkpoint_opt_param_scheduler
    changed = changes(progress.recipe, optimizer.schedule)
    if changed and not chosen:
        raise ModelLinkError("the resumed run has another schedule: " + "; ".join(changed), where=folder,
                             fix="--override-opt-param-scheduler uses that of this command, --use-checkpoint-opt-param-scheduler "
                             "that of the checkpoint")


def _check_precision(progress: Progress, folder: Path | None, checkpoint: CheckpointConfig, optimizer: OptimizerConfig) -> None:
    """Refuse optimizer state of fp32 in a half-precision run and the reverse: only one of them has separate main weights."""
    before, now = progress.recipe.get("precision", optimizer.dtype_name), optimizer.dtype_name
    if checkpoint.load_optim and before != now and "float32" in (before, now):
        raise ModelLinkError(f"the run was saved in {before} and this one is in {now}: the optimizer state does not fit",
                             where=f"{folder}, --bf16, --fp16",
                             fix="resume with --no-load-optim, or load only the weights with --finetune")


def open_reference(given: CheckpointConfig, start: Start, lora: LoraConfig, spec: ModelSpec) -> Checkpoint | None:
    """The checkpoint of the reference model: --ref-load, or the --load that the run started with. None: random weights.

    Args:
        given: the options before --auto-resume replaced --load.

    Raises:
        ModelLinkError: a resumed run without either, or a reference model of another architecture.
    """
    if given.ref_load is None and (start.resumed is None or lora.on):  # adapters always have their base in --load
        return start.source
    path = given.ref_load or given.load
    if path is None or (given.ref_load is None and path.resolve() == start.resumed_run):
        raise ModelLinkError("the resumed run needs the reference model it started with", where="--ref-load",
                             fix="give the checkpoint that was --load when the run started")
    reference = open_checkpoint(path, family=given.model_type_hf,
                                hf=None if describes_itself(path) else given.tokenizer_name_or_path)
    if reference.spec.explicit() != spec.explicit():
        raise ModelLinkError("the reference model has another architecture than the trained one",
                             where=f"--ref-load {path}")
    return reference


def architecture(source: Checkpoint | None, layers: list[Layer]) -> ModelSpec:
    """The architecture of the checkpoint, or without one that of the options.

    Options may repeat what the checkpoint says but not contradict it, except for a larger --max-position-embeddings.
    """
    if source is None:
        return resolve([ModelSpec], *layers)[ModelSpec]
    known, longest = source.spec.explicit(), source.spec.max_position_embeddings
    learned = source.spec.position_embedding_type == "learned_absolute"
    for layer in layers:
        for field in fields_of(ModelSpec):
            if layer.values.get(field.name) is None:
                continue
            value, theirs = field.convert(layer.values[field.name], layer.source), known[field.name]
            if field.name == "max_position_embeddings" and not (learned and value > theirs):  # not a property of the weights
                longest = max(longest, value)
                continue
            if value != theirs and not (isinstance(value, float) and isclose(value, theirs or 0.0, rel_tol=1e-6)):
                given = layer.source == "command line"
                fix = "remove it: the checkpoint defines it" if given else "the checkpoint is of another model"
                raise ModelLinkError(f"{field.flag} is {value} in {layer.source} and {theirs} in the checkpoint",
                                     where=f"{layer.source}, {source.folder}", fix=fix)
    return replace(source.spec, max_position_embeddings=longest)
