# SPDX-License-Identifier: Apache-2.0
"""The training loop: iterate, report, evaluate, save, stop. The method owns data, forward step and loss (method.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.profiler import record_function

from modellink.core.determinism import deterministic
from modellink.core.profiling import Profiler
from modellink.core.run import Run
from modellink.core.train.balance import balance_losses
from modellink.core.train.callbacks import Callback
from modellink.core.train.checkpoint import finish_removals
from modellink.core.train.digest import Digests
from modellink.core.train.finite import keep_batch, refuse_not_finite
from modellink.core.train.guard import GuardFactory, NoGuard
from modellink.core.train.history import Step
from modellink.core.train.method import Feed, Method
from modellink.core.train.metrics import Clock, Metrics
from modellink.core.train.optimizer import let_go, whole_parameters
from modellink.core.train.saving import save, save_now
from modellink.core.train.setup import set_up
from modellink.core.train.step import run_schedule
from modellink.core.train.stop import SIGNALLED, Stop, is_multiple
from modellink.core.train.training import Training
from modellink.core.train.writer import Writer
from modellink.kernels.ops import plain_forms
from modellink.kernels.terminal import above_a_line


def train(run: Run, method: Method, callbacks: Sequence[Callback] = (), guard: GuardFactory = NoGuard) -> list[Step]:
    """Train until the last iteration, --exit-interval or a stop signal; every rank of the layout calls it.

    The process groups must exist (processes.join).

    Returns:
        On the last rank the finished iterations, including those before a resume; an empty list on other ranks.
    """
    with plain_forms(*run.fused.plain_ops), deterministic(run.determinism.use_deter_comp, run.optimizer.seed):
        method.open_data()
        training = set_up(run, reference=method.needs_reference)
        return Loop(run, training, method, callbacks, guard).run_all()


class Loop:
    """One training run on this rank, from `training.iteration` on."""

    def __init__(self, run: Run, training: Training, method: Method, callbacks: Sequence[Callback],
                 guard: GuardFactory) -> None:
        self.run, self.training, self.method, self.callbacks = run, training, method, callbacks
        self.feeds = method.feeds(training)
        self.metrics = Metrics(run, training.iteration, active=dist.get_rank() == dist.get_world_size() - 1,
                               reports_memory=parallel_state.get_data_parallel_rank() == 0)
        self.clock, self.writer = Clock(run.device), Writer()
        self.digests = Digests(run, training)
        self.last_step: Step | None = None
        self.loss_scale: float | None = None
        self.stop = Stop(run.checkpoint, run.device.torch)
        self.guard = guard(run, training, partial(save_now, training), self.advance)

    def run_all(self) -> list[Step]:
        """Train, evaluate at the end, and release the models."""
        with above_a_line():
            try:
                self._run_all()
            except BaseException:
                self.metrics.screen.close()
                raise
        let_go(self.training.models)
        return self.metrics.history.steps

    def _run_all(self) -> None:
        run, training = self.run, self.training
        for callback in self.callbacks:
            callback.on_start(training)
        with self.stop:
            leaving = self._iterate_all()
            if leaving is None and (training.iteration == run.optimizer.train_iters or run.logging.skip_train):
                leaving = self._evaluate_at_end()
        if leaving and dist.get_rank() == 0:
            print(f"leaving after iteration {training.iteration}: {leaving}", flush=True)
        for callback in self.callbacks:
            callback.on_end(training)
        self.metrics.close()
        self.digests.close()

    def _evaluate_at_end(self) -> str | None:
        at = self.training.iteration
        for feed, share in ((self.feeds.valid, "validation"), (self.feeds.test, "test")):
            if not self.evaluate(feed, f"iteration {at} on {share} set"):
                return SIGNALLED
        return None

    def _iterate_all(self) -> str | None:
        """Iterate until the last iteration; return the reason to stop earlier."""
        leaving: str | None = None
        run, training, guard = self.run, self.training, self.guard
        last = run.optimizer.train_iters
        profiling = Profiler(run, training.models, training.iteration)
        with profiling as profiler, guard:
            while training.iteration < last and not run.logging.skip_train and leaving is None:
                guard.attempt(self.iterate)
                self._report_step()
                profiler.step()
                guard.beat()  # writing a trace takes time
                with guard.finishing(last=False):
                    self.writer.poll()
                leaving = self._after_iteration(self.stop.reason(training.iteration))
                self.clock.lap()  # evaluating and saving do not count as part of an iteration
            with guard.finishing(last=True):
                self.writer.wait()
                finish_removals()
        return leaving

    def _report_step(self) -> None:
        """Call the callbacks; outside of the guarded step, as an error of theirs is not a failure of the rank."""
        step = self.last_step
        if step is None or step.iteration != self.training.iteration:  # a repaired step may be finished without its metrics
            return
        for callback in self.callbacks:
            callback.on_step(self.training, step)

    def _after_iteration(self, leaving: str | None) -> str | None:
        """Evaluate and save if it is time to; return the reason to stop after that."""
        run, training, at = self.run, self.training, self.training.iteration
        ended = at == run.optimizer.train_iters
        due = is_multiple(at, run.logging.eval_interval) and leaving != SIGNALLED and not ended  # the end has its own
        if due and not self.evaluate(self.feeds.valid, f"iteration {at}", self.guard.beat):
            leaving = SIGNALLED
        folder, last = run.checkpoint.save, ended or leaving is not None
        if folder is not None and (last or is_multiple(at, run.checkpoint.save_interval)):
            saved = False
            with self.guard.saving(last=last):
                save(run, training, folder, self.writer)
                saved = True
            self.metrics.draw()
            for callback in self.callbacks if saved else ():
                callback.on_save(training, folder)
        return leaving

    def iterate(self) -> None:
        """One iteration: gradients over all micro batches, an optimizer step, a line of metrics."""
        run, training, metrics = self.run, self.training, self.metrics
        for model in training.models:
            model.zero_grad_buffer()
        training.optimizer.zero_grad()
        start = training.consumed_samples
        size = run.data.batch_size_at(start, run.layout.dp)
        values = run_schedule(self.method, training.models, lambda: self.feeds.train(consumed=start), **self._sizes(start))
        loss = values[self.method.metrics[0]]
        values |= balance_losses(run.spec, run.moe, run.data.num_microbatches(run.layout.dp, start))
        measured = torch.stack([value.float() for value in values.values()])
        if run.optimizer.check_for_nan_in_loss_and_grad and not run.optimizer.fp16:
            where = f"iteration {training.iteration + 1}, samples {start} to {start + size - 1}"
            numbers = refuse_not_finite(training.models, measured, where, self._keep_batch, run.checkpoint.save)
        else:
            numbers = measured.tolist()
        found = dict(zip(values, numbers, strict=True))  # the host waits for the device once for all of them
        learning_rate = training.optimizer.param_groups[0]["lr"]
        self.digests.gradients()
        with record_function("optimizer-step"):  # a range in the traces of --profile
            updated, grad_norm, zeros = training.optimizer.step()
        self.advance(updated=updated)
        self.digests.write(training.iteration, loss)
        self.last_step = Step(
            iteration=training.iteration, consumed_samples=training.consumed_samples, global_batch_size=size,
            loss=numbers[0], learning_rate=learning_rate, grad_norm=None if grad_norm is None else float(grad_norm),
            loss_scale=self._loss_scale(), skipped=not updated, seconds=self.clock.lap(),
            num_zeros=None if zeros is None else int(zeros),
            balance={name: value for name, value in found.items() if name not in self.method.metrics},
            metrics={name: found[name] for name in self.method.metrics[1:]})
        metrics.add(self.last_step)

    def _loss_scale(self) -> float:
        """The loss scale; only a dynamic one is read from the device in every step."""
        if self.loss_scale is None or (self.run.optimizer.fp16 and self.run.optimizer.loss_scale is None):
            self.loss_scale = self.training.optimizer.get_loss_scale().item()
        return self.loss_scale

    def advance(self, *, updated: bool = True) -> None:
        """Count one more iteration, and step the schedule if the weights were updated."""
        run, training = self.run, self.training
        size = run.data.batch_size_at(training.consumed_samples, run.layout.dp)
        if updated:
            training.schedule.step(increment=size if run.optimizer.by_samples else 1)
        training.iteration += 1
        training.consumed_samples += size

    @torch.no_grad()
    def evaluate(self, feed: Feed | None, where: str, beat: Callable[[], None] = lambda: None) -> bool:
        """Report the mean metrics over --eval-iters iterations from the start of `feed`; call `beat` after each.

        Returns:
            False if SIGTERM has interrupted it; then nothing is reported.
        """
        run, training = self.run, self.training
        if feed is None or run.logging.eval_iters == 0:
            return True
        for model in training.models:
            model.eval()
        size = run.data.samples_per_iteration(run.layout.dp)
        with whole_parameters(training.models):
            found = []
            for number in range(run.logging.eval_iters):
                if interrupted := self.stop.signalled():
                    break
                found.append(run_schedule(self.method, training.models, partial(feed, consumed=number * size),
                                          forward_only=True, **self._sizes(None)))
                self.metrics.evaluating(where, len(found))
                beat()
        for model in training.models:
            model.train()
        if interrupted:
            return False
        means = {name: torch.stack([values[name] for values in found]).mean().item() for name in self.method.metrics}
        self.metrics.evaluation(where, means, training.iteration)
        for callback in self.callbacks:
            callback.on_evaluation(training, where, means)
        return True

    def _keep_batch(self) -> str:
        self.writer.wait()  # the save in progress holds good weights
        run, training = self.run, self.training
        if run.checkpoint.save is None:
            return "with --save the batch would have been kept"
        start = training.consumed_samples
        return keep_batch(run.checkpoint.save / f"not_finite_{training.iteration + 1:07d}", self.feeds.train(consumed=start),
                          run.data.num_microbatches(run.layout.dp, start))

    def _sizes(self, consumed: int | None) -> dict[str, Any]:
        data = self.run.data
        return {"num_microbatches": data.num_microbatches(self.run.layout.dp, consumed), "seq_length": data.seq_length,
                "micro_batch_size": data.micro_batch_size}
