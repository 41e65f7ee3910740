# SPDX-License-Identifier: Apache-2.0
"""Stores every parameter once in bf16 training (`--reuse-fp32-param`): the bf16 weight is the upper half of the fp32 one.

An fp32 number is its rounding to bf16, which the model computes with, plus a 16-bit difference of bit patterns. The optimizer
keeps only the second part: 4 bytes per parameter instead of 6, with the distributed optimizer 2 + 2 / data-parallel ranks instead
of 2 + 4 / ranks. The optimizer step assembles the fp32 numbers one slice at a time.

The two halves give the fp32 number exactly, except in one case of 131072: a number half-way between two bf16 numbers
that rounds down loses its last bit. Checkpoints hold full fp32 parameters in either mode, so a run can be resumed
with or without this option.

Not here: fp16, which is not the upper half of fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from modellink.core.model.specialize import specialize
from modellink.kernels.errors import InternalError

SLICE = 1 << 20  # numbers assembled at a time


class Halves:
    """The two halves of a parameter, or of this rank's shard of one.

    Args:
        upper: bf16, flat; the memory of the model's weight.
    """

    def __init__(self, upper: Tensor) -> None:
        self.upper, self.lower = upper, torch.zeros_like(upper, dtype=torch.int16)

    def slices(self) -> Iterator[slice]:
        yield from (slice(start, start + SLICE) for start in range(0, self.upper.numel(), SLICE))

    def whole(self, part: slice = slice(None)) -> Tensor:
        """A copy in fp32, flat."""
        upper = self.upper[part].view(torch.int16).int() << 16
        return (upper + self.lower[part]).view(torch.float32)

    def store(self, value: Tensor, part: slice = slice(None)) -> None:
        rounded = value.bfloat16()
        rest = value.contiguous().view(torch.int32) - (rounded.view(torch.int16).int() << 16)
        self.upper[part].copy_(rounded)
        self.lower[part].copy_(rest.clamp(-0x8000, 0x7FFF))


def share(optimizer: Any) -> None:
    """Replace the fp32 parameters of megatron-core's bf16 optimizer by halves."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        if type(part) not in KINDS:
            raise InternalError(f"{type(part).__name__} has no fp32 copies of bf16 parameters")
        specialize(part, KINDS[type(part)])
        _replace(part)


def _replace(part: Any) -> None:
    """Replace each main parameter by an empty tensor of its shape with halves, which carries the gradient and the state."""
    made = {}
    for uppers, mains in zip(part.upper_groups(), part.main_groups(), strict=True):
        for number, (upper, main) in enumerate(zip(uppers, mains, strict=True)):
            stand_in = torch.empty(1, device=main.device).expand(main.shape)
            vars(stand_in).update(vars(main))  # attributes that megatron-core sets on a parameter
            stand_in.halves = Halves(upper.detach().view(-1))  # type: ignore[attr-defined]
            made[main], mains[number] = stand_in, stand_in
    ranges = [group["orig_group"] for group in getattr(part, "opt_group_ranges", [])]  # these would keep the old ones alive
    for group in (*part.optimizer.param_groups, *ranges):
        group["params"] = [made.get(param, param) for param in group["params"]]
    for parameter in (parameter for group in part.float16_parameters() for parameter in group):
        parameter.main_param = made.get(parameter.main_param)


def _forget_rest(part: Any) -> None:
    """Set the main parameters to the rounded ones of the model."""
    for group in part.main_groups():
        for main in group:
            main.halves.lower.zero_()


class _SharedPlain(Float16OptimizerWithFloat16Params):
    def upper_groups(self) -> list[list[Tensor]]:
        return self.float16_groups

    float16_parameters = upper_groups

    def main_groups(self) -> list[list[Any]]:
        return self.fp32_from_float16_groups

    def _copy_main_params_to_model_params(self) -> None:
        """Nothing to copy: they share memory."""

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        _forget_rest(self)

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict(is_loading)
        state["fp32_from_fp16_params"] = [[main.halves.whole().view(main.shape) for main in group]
                                          for group in self.main_groups()]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["fp32_from_fp16_params"]
        super().load_state_dict(state_dict | {"fp32_from_fp16_params": []})
        for mains, values in zip(self.main_groups(), saved, strict=True):
            for main, value in zip(mains, values, strict=True):
                main.halves.store(value.data.to(main.device).flatten())


class _SharedDistributed(DistributedOptimizer):
    shard_fp32_from_float16_groups: list[list[Any]]

    def upper_groups(self) -> list[list[Tensor]]:
        return self.shard_float16_groups

    def float16_parameters(self) -> list[list[Tensor]]:
        return self.model_float16_groups

    def main_groups(self) -> list[list[Any]]:
        return self.shard_fp32_from_float16_groups

    @contextlib.contextmanager
    def _fp32_alone(self) -> Iterator[None]:
        """Within the context, only parameters that are fp32 in the model are copied."""
        kept, self.shard_fp32_from_float16_groups = self.shard_fp32_from_float16_groups, []
        yield
        self.shard_fp32_from_float16_groups = kept

    def _copy_main_params_to_model_params(self) -> None:
        with self._fp32_alone():
            super()._copy_main_params_to_model_params()

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        with self._fp32_alone():
            super()._copy_model_params_to_main_params(state_dict)
        _forget_rest(self)

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = super()._get_main_param_and_optimizer_states(model_param)
        if halves := getattr(tensors["param"], "halves", None):
            tensors["param"] = halves.whole()
        return tensors

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        if halves := getattr(main, "halves", None):
            halves.store(tensors["param"].to(main.device))
            for name, value in self.optimizer.state[main].items():
                value.copy_(tensors[name])
        else:
            super()._set_main_param_and_optimizer_states(model_param, tensors)


KINDS: dict[type, type] = {Float16OptimizerWithFloat16Params: _SharedPlain, DistributedOptimizer: _SharedDistributed}
