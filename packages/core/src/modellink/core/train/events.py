# SPDX-License-Identifier: Apache-2.0
"""TensorBoard events under Megatron's names, with their blanks.

Names and units are those of `training_log` and `evaluate_and_print_results` in Megatron-LM's megatron/training/training.py:
`lm loss`, `learning-rate`, `batch-size`, `loss-scale`, `grad-norm`, `num-zeros`, `iteration-time` (seconds), `throughput`
(TFLOP/s per rank), `mem-*-bytes`, `lm loss validation`, `lm loss validation ppl`. Not written: the same values over samples
(`... vs samples`), as hiding what a resumed run repeats works on one kind of step only. Ours: `lm loss test` (Megatron writes the
test loss as a last point of the validation loss), `tokens-per-second` of all ranks, and `mem-resident-bytes` of a CPU.

tensorboardX's SummaryWriter replaces blanks by underscores; events are therefore written one level below it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from modellink.core.train.history import Step
from modellink.kernels.device import Device

FLUSH_SECONDS = 10.0
RESIDENT = {"allocated": "mem-resident-bytes", "max allocated": "mem-max-resident-bytes"}
MEMORY = {"allocated": "mem-allocated-bytes", "max allocated": "mem-max-allocated-bytes", "reserved": "mem-reserved-bytes"}


def step_values(step: Step, device: Device) -> dict[str, float | None]:
    """Return what TensorBoard shows of a step, by name."""
    names = RESIDENT if device.kind == "cpu" else MEMORY
    memory = {names[name]: float(value) for name, value in device.memory_report().items() if name in names}
    return {"lm loss": step.loss, "learning-rate": step.learning_rate, "grad-norm": step.grad_norm,
            "loss-scale": step.loss_scale, "iteration-time": step.seconds, "batch-size": step.global_batch_size,
            "num-zeros": step.num_zeros, **step.balance, **step.metrics, **memory}


class Events:
    """A new event file.

    Args:
        resumed: the iteration the run resumes from; TensorBoard hides later points of other files in the folder.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._proto, self._summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{resumed}")
        self._flushed = 0.0
        if resumed:
            self._write(resumed + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        scalars = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(iteration, summary=self._summary.Summary(value=scalars))

    def _write(self, iteration: int, **content: object) -> None:
        now = time.time()
        self._writer.write_event(self._proto.Event(wall_time=now, step=iteration, **content))
        if now - self._flushed > FLUSH_SECONDS:
            self._flushed = now
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()
