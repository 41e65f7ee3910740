"""The training loop: iterate, tell, evaluate, save, stop. What is fed and what the loss is belong to the callers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.profiler import record_function

from modellink.ckpt_convert.weights import EXPERTS, weights
from modellink.core.data.pretrain import Batch
from modellink.core.posttrain.adapters import write_description, write_peft
from modellink.core.profiling import Profiler
from modellink.core.resilience.guard import guard
from modellink.core.run import Run
from modellink.core.train import checkpoint, rank_files
from modellink.core.train.balance import balance_losses
from modellink.core.train.checkpoint import Training
from modellink.core.train.digest import Digests
from modellink.core.train.guard import keep_batch, refuse_not_finite
from modellink.core.train.metrics import Clock, Metrics, Step, Throughput
from modellink.core.train.optimizer import let_go, whole_parameters
from modellink.core.train.step import run_schedule
from modellink.core.train.stop import Stop, is_multiple
from modellink.core.train.tracker import Tracker
from modellink.core.train.writer import Writer

Feed = Callable[..., Iterator[Batch]]
"""`feed(consumed=n)`: this rank's micro batches from global sample n on."""


def loop(run: Run, training: Training, train: Feed, valid: Feed | None, test: Feed | None) -> list[Step]:
    """Train from `training.iteration` on; see `pretrain` for what comes back."""
    last, save, logging = run.optimizer.train_iters, run.checkpoint.save, run.logging
    known = logging.log_throughput and not run.instruction.variable_seq_lengths
    if logging.log_throughput and not known and dist.get_rank() == 0:
        print("note: no throughput is shown, the lengths of the samples differ", flush=True)
    metrics = Metrics(
        active=dist.get_rank() == dist.get_world_size() - 1, reports_memory=parallel_state.get_data_parallel_rank() == 0,
        device=run.device, train_iters=last,
        log_interval=logging.log_interval, folder=save, tensorboard_dir=logging.tensorboard_dir, resumed=training.iteration,
        throughput=throughput(run) if known else None,
        tracker=None if logging.wandb_project is None else partial(Tracker, logging, save, run.settings))
    clock, writer = Clock(run.device), Writer()
    digests = Digests(run, training)
    watched = guard(run, training, partial(_save_now, training), partial(advance, run, training))
    profiled = Profiler(run, training.models, training.iteration)
    with Stop(run.checkpoint, run.device.torch) as stop, profiled as profiler, watched:
        while training.iteration < last and not logging.skip_train:
            watched.attempt(partial(iterate, run, training, train, metrics, clock, writer, digests))
            profiler.step()
            watched.beat()  # the end of a trace takes its time
            with watched.finishing(last=False):
                writer.poll()
            at = training.iteration
            leaving = stop.reason(at)
            if is_multiple(at, logging.eval_interval):
                evaluate(run, training, valid, metrics, f"iteration {at}", watched.beat)
            if save is not None and (at == last or leaving or is_multiple(at, run.checkpoint.save_interval)):
                with watched.saving(last=bool(at == last or leaving)):
                    _save(run, training, save, writer)
            if leaving:
                if dist.get_rank() == 0:
                    print(f"leaving after iteration {at}: {leaving}", flush=True)
                break
            clock.lap()  # evaluating and saving are not part of an iteration
        with watched.finishing(last=True):
            writer.wait()
    if training.iteration == last or logging.skip_train:
        evaluate(run, training, valid, metrics, f"iteration {training.iteration} on validation set")
        evaluate(run, training, test, metrics, f"iteration {training.iteration} on test set")
    metrics.close(logging.curve or (save and save / "loss.svg"))
    digests.close()
    let_go(training.models)
    return metrics.history


def _save(run: Run, training: Training, folder: Path, writer: Writer) -> None:
    checkpoint.save(training, folder, run.manifest, run.companions, tokenizer_alone=run.source is None,
                    beside=_beside(run, folder), keep=run.checkpoint.save_total_limit,
                    behind=writer if run.checkpoint.async_save else None)


def _save_now(training: Training, run: Run) -> None:
    assert run.checkpoint.save is not None
    _save(replace(run, checkpoint=replace(run.checkpoint, async_save=False)), training, run.checkpoint.save, Writer())


def _beside(run: Run, folder: Path) -> Callable[[Path], None] | None:
    """What a save has beside the state of the run."""
    form = run.checkpoint.save_format
    if form != "torch-dist":
        return partial(rank_files.write, form=form, manifest=run.manifest, layout=run.layout,
                       divisible_by=run.parallel.make_vocab_size_divisible_by, grouped=run.moe.moe_grouped_gemm)
    if not run.lora.on or run.checkpoint.load is None or dist.get_rank() > 0:
        return None
    write_description(folder, run.lora)
    return partial(write_peft, manifest=run.manifest, lora=run.lora, base=run.checkpoint.load)


def iterate(run: Run, training: Training, feed: Feed, metrics: Metrics, clock: Clock, writer: Writer,
            digests: Digests) -> None:
    """One iteration: gradients over all micro batches, an optimizer step, a line of metrics."""
    for model in training.models:
        model.zero_grad_buffer()
    training.optimizer.zero_grad()
    start = training.consumed_samples
    size = run.data.batch_size_at(start, run.layout.dp)
    loss = run_schedule(training.models, lambda: feed(consumed=start), **_sizes(run, start))
    if run.optimizer.check_for_nan_in_loss_and_grad and not run.optimizer.fp16:
        refuse_not_finite(training.models, loss, f"iteration {training.iteration + 1}, samples {start} to {start + size - 1}",
                          lambda: _keep_batch(run, training, feed, writer))
    learning_rate = training.optimizer.param_groups[0]["lr"]
    digests.gradients()
    with record_function("optimizer-step"):  # a range in the traces of --profile
        updated, grad_norm, zeros = training.optimizer.step()
    advance(run, training, updated=updated)
    digests.write(training.iteration, loss)
    metrics.add(Step(
        iteration=training.iteration, consumed_samples=training.consumed_samples, global_batch_size=size, loss=loss.item(),
        learning_rate=learning_rate, grad_norm=None if grad_norm is None else float(grad_norm),
        loss_scale=training.optimizer.get_loss_scale().item(), skipped=not updated, seconds=clock.lap(),
        num_zeros=None if zeros is None else int(zeros),
        balance=balance_losses(run.spec, run.moe, run.data.num_microbatches(run.layout.dp, start))))


def advance(run: Run, training: Training, *, updated: bool = True) -> None:
    """The training is one iteration further."""
    size = run.data.batch_size_at(training.consumed_samples, run.layout.dp)
    if updated:
        training.schedule.step(increment=size if run.optimizer.by_samples else 1)
    training.iteration += 1
    training.consumed_samples += size


@torch.no_grad()
def evaluate(run: Run, training: Training, feed: Feed | None, metrics: Metrics, where: str,
             beat: Callable[[], None] = lambda: None) -> None:
    """The mean loss over --eval-iters iterations of an evaluation set, from its beginning; `beat` is called after each."""
    if feed is None or run.logging.eval_iters == 0:
        return
    for model in training.models:
        model.eval()
    size = run.data.samples_per_iteration(run.layout.dp)
    sizes = _sizes(run, None)
    with whole_parameters(training.models):
        losses = []
        for number in range(run.logging.eval_iters):
            losses.append(run_schedule(training.models, partial(feed, consumed=number * size), forward_only=True, **sizes))
            beat()
    for model in training.models:
        model.train()
    metrics.evaluation(where, torch.stack(losses).mean().item(), training.iteration)


def _keep_batch(run: Run, training: Training, feed: Feed, writer: Writer) -> str:
    writer.wait()  # the save that is on its way is of good weights
    if run.checkpoint.save is None:
        return "and with --save the batch would have been kept"
    start = training.consumed_samples
    return keep_batch(run.checkpoint.save / f"not_finite_{training.iteration + 1:07d}", feed(consumed=start),
                      run.data.num_microbatches(run.layout.dp, start))


def _sizes(run: Run, consumed: int | None) -> dict[str, Any]:
    return {"num_microbatches": run.data.num_microbatches(run.layout.dp, consumed), "seq_length": run.data.seq_length,
            "micro_batch_size": run.data.micro_batch_size}


def throughput(run: Run) -> Throughput:
    """What an iteration's speed is measured by. A sample's forward and backward passes (backward counts twice, and once for
    weights that are frozen) are the matrix products a token takes part in, and causal attention at half of its square (as in the
    appendix of Narayanan et al. 2021). Padding counts."""
    spec, seq = run.spec, run.data.seq_length
    attention = spec.num_layers * seq * spec.num_attention_heads * (spec.head_dim + spec.value_dim) / 2
    products = float(spec.hidden_size * spec.vocab_size)
    for name, weight in weights(spec).items():
        if name.startswith("decoder.") and len(weight.shape) == 2:
            products += math.prod(weight.shape) * (spec.moe_router_topk / (spec.num_experts or 1) if EXPERTS in name else 1)
    peak = run.logging.peak_tflops
    tokens = seq / run.layout.world_size
    flops = (6.0 * attention + (4.0 if run.lora.on else 6.0) * products) * tokens
    return Throughput(tokens, flops, None if peak is None else peak * 1e12)
