# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW in the form that megatron-core's optimizers expect: the step count is in the parameter group, as in Apex.

The arithmetic is `kernels.ops.adamw`. A parameter with `halves` (memory/reuse_fp32.py) is assembled one slice at a
time. Not here: gradient clipping, loss scaling and sharding, which megatron-core does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from modellink.kernels import ops
from modellink.kernels.ops.adamw import Settings


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015); with `adam_w_mode` AdamW (Loshchilov & Hutter 2019), whose weight decay is decoupled."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, adam_w_mode: bool = True, **_: object) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {name: torch.zeros_like(param, memory_format=torch.contiguous_format)
                                         for name in ("exp_avg", "exp_avg_sq")}
            beta1, beta2 = group["betas"]
            settings = Settings(step=group["step"], lr=group["lr"], beta1=beta1, beta2=beta2, epsilon=group["eps"],
                                weight_decay=group["weight_decay"], decoupled=self.adam_w_mode)
            whole = [param for param in params if not hasattr(param, "halves")]
            ops.adamw(whole, [param.grad for param in whole], [self.state[param]["exp_avg"] for param in whole],
                      [self.state[param]["exp_avg_sq"] for param in whole], settings)
            for param in params:
                if hasattr(param, "halves"):
                    self._step_of_halves(param, settings)

    def _step_of_halves(self, param: Any, settings: Settings) -> None:
        grad, mean, variance = (x.view(-1) for x in (param.grad, self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]))
        for part in param.halves.slices():
            value = param.halves.whole(part)
            ops.adamw([value], [grad[part]], [mean[part]], [variance[part]], settings)
            param.halves.store(value, part)
