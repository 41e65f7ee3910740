# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: everything a run needs to resume at any layout, in megatron-core's torch-dist format.

    SAVE/modellink.json, SAVE/hf/                    description of the model (ckpt_convert.manifest)
    SAVE/iter_0000010/{*.distcp, .metadata, common.pt, training.json, modellink.complete}
    SAVE/latest_checkpointed_iteration.txt           moved last

All ranks write to `iter_N.tmp/`, possibly in the background (writer.py); when all are done, rank 0 calls fsync,
writes the marker, renames, moves the tracker and removes old saves. A failed save leaves nothing behind, and weights that are
not finite are not saved. Readers take the last complete iteration, regardless of the tracker. Weights have canonical names, so
the converter reads them too.

Not here: loading only weights (model/load.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from modellink.ckpt_convert.iterations import FOLDER, TRACKER, iteration_folder
from modellink.ckpt_convert.manifest import Manifest, write_companions
from modellink.ckpt_convert.megatron.distributed import refuse_unknown_names
from modellink.core.model.load import bare
from modellink.core.train import ownership
from modellink.core.train.finite import refuse_bad_weights
from modellink.core.train.optimizer import whole_parameters
from modellink.core.train.optimizer_state import OptimizerState
from modellink.core.train.progress import Progress, changes, read_progress, write_progress
from modellink.core.train.random_state import random_state, set_random_state
from modellink.core.train.training import Training
from modellink.core.train.writer import Writer, on_all_ranks
from modellink.kernels.errors import InternalError, ModelLinkError
from modellink.kernels.files import atomic_write, finish_folder, kill_point
from modellink.kernels.messages import note


def save(training: Training, folder: Path, manifest: Manifest, companions: Path | None, *, tokenizer_alone: bool = False,
         extra_files: Callable[[Path], None] | None = None, keep: int | None = None, background: Writer | None = None) -> None:
    """Write a checkpoint of the current iteration into `folder`; all ranks call it.

    Args:
        manifest: the description that the checkpoint carries.
        companions: folder of config and tokenizer files to copy; only the tokenizer with `tokenizer_alone`.
        extra_files: writes further files into the iteration's folder before it is complete; every rank calls it.
        keep: number of newest checkpoints to keep. Default: all.
        background: writes in the background. Default: the checkpoint is complete when this returns.
    """
    iteration = training.iteration
    path = folder / iteration_folder(iteration)
    temporary = path.with_name(path.name + ".tmp")
    first = dist.get_rank() == 0
    writer = background or Writer()
    writer.wait()
    ownership.check(folder)
    with whole_parameters(training.models):
        refuse_bad_weights(training, folder)

    def begin() -> None:
        if first:
            print(f"saving checkpoint at iteration {iteration:7d} to {folder} in torch-dist format", flush=True)
            finish_removals()
            for unfinished in folder.glob("iter_*.tmp"):
                shutil.rmtree(unfinished)
            temporary.mkdir(parents=True)
            write_companions(folder, manifest, companions, tokenizer_alone=tokenizer_alone)

    on_all_ranks(begin, temporary)
    progress = Progress(iteration, training.consumed_samples, str(training.layout), training.distributed_optimizer,
                        training.by_samples, training.ordered, training.method, training.order,
                        training.global_batch_size, training.recipe)

    def complete() -> None:
        if first:
            write_progress(temporary, progress)
            finish_folder(temporary, path)
            kill_point("before-tracker")
            with atomic_write(folder / TRACKER, "w") as file:
                file.write(str(iteration))
            if keep is not None:
                drop_older(folder, iteration, keep)
            print(f"  successfully saved checkpoint at iteration {iteration:7d} to {folder}", flush=True)

    def finish() -> None:
        if extra_files is not None:
            extra_files(temporary)
        dist.barrier()
        ownership.check(folder)
        on_all_ranks(complete, temporary)

    with whole_parameters(training.models):
        state = _weights(training)
        optimizer = _optimizer(training, state, loading=False)
        state["optimizer"] = optimizer.tensors
        state |= _random_state(training)
        state |= {"schedule": training.schedule.state_dict(), "optimizer_common": optimizer.common}
        request = dist_checkpointing.save(state, str(temporary), async_sharded_save=True)
        writer.start(request, finish, temporary, copy=background is not None)
    if background is None:
        writer.wait()


def drop_older(folder: Path, iteration: int, keep: int) -> None:
    """Remove all but the newest `keep` saves up to `iteration`, in the background; what is being removed has another name."""
    saves = sorted((int(match[1]), path) for path in folder.glob("iter_*") if (match := FOLDER.match(path.name)))
    for _, path in [save for save in saves if save[0] <= iteration][:-keep]:
        leaving = path.rename(path.with_name(path.name + ".tmp"))
        _removals.append(_remover().submit(shutil.rmtree, leaving))


_removals: list[Future[None]] = []


@cache
def _remover() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="removal")


def finish_removals() -> None:
    """Wait until old saves are removed; one that cannot be removed is noted, and the next save tries again."""
    while _removals:
        if (error := _removals.pop().exception()) is not None:
            note(f"an old checkpoint could not be removed: {error}", every_rank=True)


def resume(training: Training, path: Path, *, load_optim: bool = True, load_rng: bool = True) -> None:
    """Load weights, optimizer, schedule, random state and progress from an iteration's folder; all ranks call it.

    The layout may differ from that of the save; then the random state, which dropout uses, is initialized again.

    Args:
        load_optim: load the optimizer state. Otherwise it is initialized again.
        load_rng: load the random state. Otherwise it is initialized again.
    """
    refuse_unknown_names(path)  # megatron-core unpickles the metadata unchecked
    progress = read_progress(path)
    assert progress is not None
    same = progress.layout == str(training.layout)
    wanted = _weights(training)
    optimizer = _optimizer(training, wanted, loading=True) if load_optim else None
    if optimizer is not None:
        wanted["optimizer"] = optimizer.tensors
    wanted |= _random_state(training) if same and load_rng else {}
    try:
        state = dist_checkpointing.load(wanted, str(path))
    except dist_checkpointing.core.CheckpointingException as error:
        raise ModelLinkError(f"the checkpoint does not fit this run: {error}", where=path,
                             fix="use the settings of the saved run; on another kind of device --no-load-rng; or load only its "
                             "weights with --finetune") from None
    for name, model in _chunks(training):
        bare(model).load_state_dict(state[name], strict=all(parameter.requires_grad for parameter in model.parameters()))
    if optimizer is not None:
        with torch.no_grad():  # in fp32 the optimizer and the model share parameters
            training.optimizer.load_state_dict(optimizer.filled(state["optimizer"], state["optimizer_common"]))
    else:
        training.optimizer.reload_model_params()
    training.schedule.load_state_dict(state["schedule"])
    if same and load_rng:
        _set_random_state(training, state)
    elif load_rng:
        note(f"saved at {progress.layout}, resumed at {training.layout}: the random state is initialized again")
    training.iteration, training.consumed_samples = progress.iteration, progress.consumed_samples
    training.ordered = progress.ordered
    if progress.global_batch_size not in (None, training.global_batch_size):
        note(f"the global batch size was {progress.global_batch_size} and is {training.global_batch_size}")
    for line in changes(progress.recipe, training.recipe):
        note(f"{line}, from iteration {training.iteration + 1} on")
    for name in sorted(progress.order.keys() & training.order.keys()):
        if progress.order[name] != training.order[name]:
            note(f"{name} was {progress.order[name]} and is {training.order[name]}: training resumes after the same number of "
                 "samples, in another order")


def _chunks(training: Training) -> list[tuple[str, Any]]:
    if len(training.models) == 1:
        return [("model", training.models[0])]
    return [(f"model{number}", model) for number, model in enumerate(training.models)]


def _metadata() -> dict[str, Any]:
    return {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _weights(training: Training) -> dict[str, Any]:
    """The sharded state of the model chunks in megatron-core's form."""
    state: dict[str, Any] = {}
    for name, model in _chunks(training):
        whole: Any = bare(model)
        tensors = whole.sharded_state_dict(metadata=_metadata())
        # `_extra_state` is empty without Transformer Engine; dropping it leaves a checkpoint without pickled objects
        state[name] = {key: value for key, value in tensors.items() if not key.endswith("_extra_state")}
        frozen = {key for key, parameter in bare(model).named_parameters() if not parameter.requires_grad}
        if frozen:  # only adapters are trained
            state[name] = {key: value for key, value in state[name].items() if ".lora_" in key}
        if lost := dict(bare(model).named_parameters()).keys() - state[name].keys() - frozen:
            raise InternalError(f"the checkpoint would lack {sorted(lost)[:5]}")
    return state


def _optimizer(training: Training, weights: dict[str, Any], *, loading: bool) -> OptimizerState:
    """The optimizer state for these weights; `loading` allocates it in the optimizer."""
    models = dict(weights) if len(training.models) > 1 else weights["model"]
    return OptimizerState(training.optimizer, models, loading=loading, metadata=_metadata())


def _random_state(training: Training) -> dict[str, Any]:
    """The states of the random generators of this rank, as byte tensors at its position in a [pp, tp, dp, ...] tensor."""
    layout = training.layout
    place = [(0, parallel_state.get_pipeline_model_parallel_rank(), layout.pp),
             (1, parallel_state.get_tensor_model_parallel_rank(), layout.tp),
             (2, parallel_state.get_data_parallel_rank(with_context_parallel=True), layout.dp * layout.cp)]
    return {f"random.{name}": ShardedTensor.from_rank_offsets(f"random.{name}", state.cpu(), *place, prepend_axis_num=3)
            for name, state in random_state(training.device).items()}


def _set_random_state(training: Training, state: dict[str, Any]) -> None:
    found = {name.removeprefix("random."): value for name, value in state.items() if name.startswith("random.")}
    set_random_state(found, training.device)
