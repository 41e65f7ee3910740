# SPDX-License-Identifier: Apache-2.0
"""Length of the run, precision, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option

if TYPE_CHECKING:
    import torch

SCHEDULE = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples",
            "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "weight_decay", "start_weight_decay", "end_weight_decay",
            "weight_decay_incr_style")
"""Fields that `OptimizerConfig.schedule` may have, besides the length of the run."""


@dataclass(frozen=True)
class OptimizerConfig:
    heading: ClassVar[str] = "Optimizer"

    lr: float = option(doc="Peak learning rate.", minimum=0)
    train_iters: int = option(0, "Total iterations; alternatively --train-samples.", minimum=1)
    train_samples: int | None = option(
        None, "Total samples, rounded down to full batches; schedules then count samples.", minimum=1)
    min_lr: float = option(0.0, "Learning rate at the end of the decay.", minimum=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option("linear", "Shape of the decay.")
    lr_decay_iters: int | None = option(None, "Iterations of the decay. Default: all.", minimum=1)
    lr_warmup_iters: int = option(0, "Iterations of linear warm-up.", minimum=0)
    lr_decay_samples: int | None = option(None, "With --train-samples: samples of the decay. Default: all.", minimum=1)
    lr_warmup_samples: int = option(0, "With --train-samples: samples of linear warm-up.", minimum=0)
    lr_warmup_fraction: float | None = option(None, "Warm-up as a fraction of the decay.", minimum=0, maximum=1)
    lr_warmup_init: float = option(0.0, "Learning rate at the start of the warm-up.", minimum=0)
    decoupled_lr: float | None = option(None, "Peak learning rate of the embedding and the output layer.", minimum=0)
    decoupled_min_lr: float | None = option(
        None, "Learning rate of the embedding and the output layer at the end of the decay.", minimum=0)
    weight_decay: float = option(0.01, "Decoupled weight decay; norms and biases are excluded.", minimum=0)
    start_weight_decay: float | None = option(None, "Weight decay at the first iteration, for a schedule.", minimum=0)
    end_weight_decay: float | None = option(None, "Weight decay at the last iteration.", minimum=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option(
        "constant", "Schedule of the weight decay.")
    override_opt_param_scheduler: bool = option(
        False, "Resume with the learning rate, its schedule and the weight decay of this command. Without this option and the "
        "next, they must be those of the saved run.", alias="--override-opt_param-scheduler")
    use_checkpoint_opt_param_scheduler: bool = option(
        False, "Resume with the learning rate, its schedule and the weight decay of the saved run.",
        alias="--use-checkpoint-opt_param-scheduler")
    adam_beta1: float = option(0.9, "Decay rate of the first moment.", minimum=0, below=1)
    adam_beta2: float = option(0.999, "Decay rate of the second moment.", minimum=0, below=1)
    adam_eps: float = option(1e-8, "Term added to the denominator for numerical stability.", above=0)
    clip_grad: float = option(1.0, "Maximum global gradient norm; 0 disables clipping.", minimum=0)
    bf16: bool = option(False, "Weights and activations in bfloat16, master weights and gradients in fp32.",
                         heading="Precision")
    fp16: bool = option(False, "Weights and activations in float16, with a dynamic loss scale.")
    initial_loss_scale: float = option(2.0**32, "fp16: initial loss scale.", above=0)
    loss_scale: float | None = option(None, "fp16: a constant loss scale.", above=0)
    min_loss_scale: float = option(1.0, "fp16: minimum loss scale.", above=0)
    loss_scale_window: int = option(1000, "fp16: iterations without overflow after which the loss scale doubles.", minimum=1)
    hysteresis: int = option(2, "fp16: overflows before the loss scale is halved.", minimum=1)
    check_for_nan_in_loss_and_grad: bool = option(
        True, "Stop before the weights change if the loss or a gradient is not finite; fp16 skips such a step instead.")
    attention_dropout: float = option(0.0, "Dropout of attention weights.", minimum=0, below=1,
                                      heading="Regularization and randomness")
    hidden_dropout: float = option(0.0, "Dropout of the residual branches.", minimum=0, below=1)
    init_method_std: float = option(0.02, "Standard deviation of randomly initialized weights.", minimum=0)
    seed: int = option(1234, "Seed for weights, dropout and the order of the data.", minimum=0)

    @property
    def dtype_name(self) -> Literal["bfloat16", "float16", "float32"]:
        """Precision of weights and activations, as torch names it."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else "float32"

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch's object."""
        import torch  # only the ranks need it
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def by_samples(self) -> bool:
        """Whether schedules count samples instead of iterations."""
        return self.train_samples is not None

    @property
    def total(self) -> int:
        """The length of the run in the unit of its schedules."""
        return self.train_samples or self.train_iters

    @property
    def decay(self) -> int:
        """The length of the decay in the unit of the schedules."""
        return (self.lr_decay_samples if self.by_samples else self.lr_decay_iters) or self.total

    @property
    def warmup(self) -> float:
        """The length of the warm-up in the unit of the schedules."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.decay
        return self.lr_warmup_samples if self.by_samples else self.lr_warmup_iters

    @property
    def schedule(self) -> dict[str, Any]:
        """The settings of learning rate and weight decay by field name, as JSON returns them; lengths in the unit of the run."""
        names = ["lr", "decoupled_lr", "lr_warmup_init", "lr_decay_style", "weight_decay", "weight_decay_incr_style"]
        if self.lr_decay_style != "constant":
            names += ["min_lr", "decoupled_min_lr"]
        if self.weight_decay_incr_style != "constant":
            names += ["start_weight_decay", "end_weight_decay"]
        unit = "samples" if self.by_samples else "iters"
        lengths: dict[str, Any] = {f"lr_warmup_{unit}": self.warmup}
        if self.lr_decay_style != "constant":
            lengths[f"lr_decay_{unit}"] = self.decay
        if self.weight_decay_incr_style != "constant":
            lengths[f"train_{unit}"] = self.total  # the length of the weight decay's schedule
        return {name: getattr(self, name) for name in names} | lengths

    def with_schedule(self, saved: Mapping[str, Any]) -> OptimizerConfig:
        """These settings with the schedule among the `saved` settings of a run; the length of the run stays."""
        known = {name: saved[name] for name in SCHEDULE if name in saved}
        return replace(self, lr_warmup_fraction=None, **known) if known else self

    def check(self) -> None:
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise ModelLinkError("the schedule can be that of the command or of the checkpoint, not both",
                                 where="--override-opt-param-scheduler, --use-checkpoint-opt-param-scheduler",
                                 fix="remove one of them")
        if self.bf16 and self.fp16:
            raise ModelLinkError("--bf16 and --fp16 exclude each other", where="--bf16, --fp16")
        self._check_length()
        if self.min_lr > self.lr:
            raise ModelLinkError(f"--min-lr {self.min_lr} is above the peak learning rate {self.lr}", where="--min-lr")
        if self.lr_warmup_init > self.lr:
            raise ModelLinkError(f"the warm-up starts at {self.lr_warmup_init}, above the peak {self.lr}",
                                 where="--lr-warmup-init")
        if self.decoupled_min_lr is not None and (self.decoupled_lr is None or self.decoupled_min_lr > self.decoupled_lr):
            raise ModelLinkError(f"--decoupled-min-lr {self.decoupled_min_lr} needs a larger --decoupled-lr",
                                 where="--decoupled-min-lr, --decoupled-lr")
        self._check_weight_decay()

    def _check_length(self) -> None:
        """Run and schedules are measured in the same unit, given once."""
        unit = "samples" if self.by_samples else "iters"
        if bool(self.train_iters) == self.by_samples:
            raise ModelLinkError("the length of the run is set twice" if self.by_samples else "the length of the run is not set",
                                 where="--train-iters, --train-samples", fix="give one of them")
        others = {"--lr-decay-samples": self.lr_decay_samples, "--lr-warmup-samples": self.lr_warmup_samples} if (
            not self.by_samples) else {"--lr-decay-iters": self.lr_decay_iters, "--lr-warmup-iters": self.lr_warmup_iters}
        for flag, given in others.items():
            if given:
                raise ModelLinkError(f"the run is measured by --train-{unit}, its schedule in another unit", where=flag,
                                     fix=f"give {flag.rpartition('-')[0]}-{unit}")
        if (self.lr_warmup_iters or self.lr_warmup_samples) and self.lr_warmup_fraction is not None:
            raise ModelLinkError("the warm-up is set twice", where=f"--lr-warmup-{unit}, --lr-warmup-fraction")
        if self.warmup >= self.decay and self.warmup:
            raise ModelLinkError(f"the warm-up of {self.warmup:g} does not end within the decay of {self.decay} {unit}",
                                 where=f"--lr-warmup-{unit}, --lr-decay-{unit}")

    def _check_weight_decay(self) -> None:
        ends = (self.start_weight_decay, self.end_weight_decay)
        if (self.weight_decay_incr_style == "constant") == (ends != (None, None)) or ends.count(None) == 1:
            raise ModelLinkError(f"a {self.weight_decay_incr_style} weight decay needs "
                                 + ("no ends" if self.weight_decay_incr_style == "constant" else "both ends"),
                                 where="--weight-decay-incr-style, --start-weight-decay, --end-weight-decay")
