"""How a run learns: iterations, precision, optimizer, learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class OptimizerConfig:
    section: ClassVar[str] = "optimizer"

    train_iters: int = option(doc="Iterations of the whole run.", minimum=1)
    lr: float = option(doc="Peak learning rate.", minimum=0)
    min_lr: float = option(0.0, "Learning rate at the end of the decay.", minimum=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option("linear", "Shape of the decay.")
    lr_decay_iters: int | None = option(None, "Iterations of the decay; all of them where nothing is said.", minimum=1)
    lr_warmup_iters: int = option(0, "Iterations of linear warm-up.", minimum=0)
    lr_warmup_fraction: float | None = option(None, "Warm-up as a share of the decay.", minimum=0, maximum=1)
    lr_warmup_init: float = option(0.0, "Learning rate at the beginning of the warm-up.", minimum=0)
    decoupled_lr: float | None = option(None, "Peak learning rate of the embedding and the output layer.", minimum=0)
    decoupled_min_lr: float | None = option(None, "Their learning rate at the end of the decay.", minimum=0)
    weight_decay: float = option(0.01, "Decoupled weight decay; norms and biases have none.", minimum=0)
    start_weight_decay: float | None = option(None, "Weight decay of the first iteration, where it changes.", minimum=0)
    end_weight_decay: float | None = option(None, "Weight decay of the last iteration.", minimum=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option("constant", "How it goes from one to the other.")
    adam_beta1: float = option(0.9, "Decay of the first moment.", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "Decay of the second moment.", minimum=0, maximum=1)
    adam_eps: float = option(1e-8, "Added to the root of the second moment.", minimum=0)
    clip_grad: float = option(1.0, "Largest global gradient norm; 0 does not clip.", minimum=0)
    bf16: bool = option(False, "Weights and activations in bfloat16, master weights and gradients in fp32.")
    fp16: bool = option(False, "Weights and activations in float16, with a dynamic loss scale.")
    initial_loss_scale: float = option(2.0**32, "fp16: the loss scale to start with.")
    loss_scale: float | None = option(None, "fp16: a loss scale that stays as it is.", minimum=0)
    min_loss_scale: float = option(1.0, "fp16: the smallest loss scale.", minimum=0)
    loss_scale_window: int = option(1000, "fp16: iterations without overflow after which the loss scale doubles.", minimum=1)
    hysteresis: int = option(2, "fp16: overflows after which the loss scale is halved.", minimum=1)
    check_for_nan_in_loss_and_grad: bool = option(
        True, "End the run when loss or gradients are not finite, before they reach the weights; fp16 skips such a step.")
    attention_dropout: float = option(0.0, "Share of attention weights dropped.", minimum=0, maximum=1)
    hidden_dropout: float = option(0.0, "Share of residual branches dropped.", minimum=0, maximum=1)
    init_method_std: float = option(0.02, "Standard deviation of random weights.", minimum=0)
    seed: int = option(1234, "Of random weights, dropout and the order of the data.")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def decay_iters(self) -> int:
        return self.lr_decay_iters or self.train_iters

    @property
    def warmup_iters(self) -> float:
        return self.lr_warmup_iters if self.lr_warmup_fraction is None else self.lr_warmup_fraction * self.decay_iters

    def check(self) -> None:
        if self.bf16 and self.fp16:
            raise ModelLinkError("a run has one precision", where="--bf16, --fp16")
        if self.lr_warmup_iters and self.lr_warmup_fraction is not None:
            raise ModelLinkError("the warm-up is given twice", where="--lr-warmup-iters, --lr-warmup-fraction")
        if self.warmup_iters >= self.decay_iters and self.warmup_iters:
            raise ModelLinkError(f"the warm-up of {self.warmup_iters:g} iterations does not end within the decay of "
                                 f"{self.decay_iters}", where="--lr-warmup-iters")
        if self.min_lr > self.lr:
            raise ModelLinkError(f"the smallest learning rate {self.min_lr} is above the peak {self.lr}", where="--min-lr")
        if self.lr_warmup_init > self.lr:
            raise ModelLinkError(f"the warm-up begins at {self.lr_warmup_init}, above the peak {self.lr}",
                                 where="--lr-warmup-init")
        if self.decoupled_min_lr is not None and (self.decoupled_lr is None or self.decoupled_min_lr > self.decoupled_lr):
            raise ModelLinkError(f"the smallest decoupled learning rate {self.decoupled_min_lr} has no peak above it",
                                 where="--decoupled-min-lr, --decoupled-lr")
        ends = (self.start_weight_decay, self.end_weight_decay)
        if (self.weight_decay_incr_style == "constant") == (ends != (None, None)) or ends.count(None) == 1:
            raise ModelLinkError(f"a weight decay that is {self.weight_decay_incr_style} has both ends, or none if constant",
                                 where="--weight-decay-incr-style, --start-weight-decay, --end-weight-decay")
