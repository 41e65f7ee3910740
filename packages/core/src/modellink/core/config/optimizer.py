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
    weight_decay: float = option(0.01, "Decoupled weight decay; norms and biases have none.", minimum=0)
    adam_beta1: float = option(0.9, "Decay of the first moment.", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "Decay of the second moment.", minimum=0, maximum=1)
    adam_eps: float = option(1e-8, "Added to the root of the second moment.", minimum=0)
    clip_grad: float = option(1.0, "Largest global gradient norm; 0 does not clip.", minimum=0)
    bf16: bool = option(False, "Weights and activations in bfloat16, master weights and gradients in fp32.")
    fp16: bool = option(False, "Weights and activations in float16, with a dynamic loss scale.")
    initial_loss_scale: float = option(2.0**32, "fp16: the loss scale to start with.")
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
