# SPDX-License-Identifier: Apache-2.0
"""AdamW (Loshchilov and Hutter 2019): one step over a list of tensors, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of


@dataclass(frozen=True)
class Settings:
    """`step` counts from 1; `decoupled` False adds the decay to the gradient (plain Adam with L2)."""

    step: int
    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    decoupled: bool = True


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor],
          variances: Sequence[Tensor], settings: Settings) -> None:
    """Update `params`, `means` (first moments) and `variances` (second moments), all on one device, in place."""
    for param, grad, mean, variance in zip(params, grads, means, variances, strict=True):
        if not param.shape == grad.shape == mean.shape == variance.shape:
            raise ValueError(f"adamw: a gradient of {list(grad.shape)} and moments of {list(mean.shape)} and "
                             f"{list(variance.shape)} for a parameter of {list(param.shape)}")
    if params:
        form_of("adamw", params[0].device.type, FORMS, plain)(params, grads, means, variances, settings)


def plain(params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor],
          variances: Sequence[Tensor], s: Settings) -> None:
    for param, grad, mean, variance in zip(params, grads, means, variances, strict=True):
        if s.decoupled:
            param.mul_(1 - s.lr * s.weight_decay)
        else:
            grad = grad + s.weight_decay * param
        mean.lerp_(grad, 1 - s.beta1)
        variance.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
        denominator = (variance / (1 - s.beta2**s.step)).sqrt_().add_(s.epsilon)
        param.addcdiv_(mean, denominator, value=-s.lr / (1 - s.beta1**s.step))


def torch_fused(params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor],
                variances: Sequence[Tensor], s: Settings) -> None:
    form = torch._fused_adamw_ if s.decoupled else torch._fused_adam_
    steps = [torch.full((), float(s.step), device=params[0].device)] * len(params)  # one, filled on the device
    form(list(params), list(grads), list(means), list(variances), [], steps, lr=s.lr, beta1=s.beta1,
         beta2=s.beta2, weight_decay=s.weight_decay, eps=s.epsilon, amsgrad=False, maximize=False)


def npu(params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor],
        variances: Sequence[Tensor], s: Settings) -> None:
    if not s.decoupled:  # the fused op has only decoupled decay
        plain(params, grads, means, variances, s)
        return
    for param, grad, mean, variance in zip(params, grads, means, variances, strict=True):
        # beta^(step - 1): the kernel multiplies by beta once more
        torch.ops.npu.npu_apply_adam_w(s.beta1 ** (s.step - 1), s.beta2 ** (s.step - 1), s.lr, s.weight_decay,
                                       s.beta1, s.beta2, s.epsilon, grad, None, False, False,
                                       out=[param, mean, variance])


FORMS: dict[str, Callable[..., None]] = {"cpu": torch_fused, "cuda": torch_fused, "npu": npu}
