# SPDX-License-Identifier: Apache-2.0
"""The optimizer state as tensors by weight name, so that a run can resume at any layout.

megatron-core has one optimizer or, with expert parallelism, a chain of two, depending on the layout and even on the
pipeline stage. Its tensors are named after their weights and independent of that; the rest of its state is not, but
amounts to the step count and the loss scale. A checkpoint holds these two and the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

from modellink.core.train.optimizer import inner_optimizers

Path = tuple[Any, ...]
METADATA = {"chained_optim_avoid_prefix": True}


class OptimizerState:
    """A snapshot of an optimizer: `tensors` and `common` go into a checkpoint, `filled` converts them back.

    Args:
        optimizer: megatron-core's.
        models: the sharded state of the model chunks.
        loading: the state will be loaded, not saved.
        metadata: megatron-core's metadata for sharded states.
    """

    def __init__(self, optimizer: Any, models: Any, *, loading: bool, metadata: Mapping[str, Any]) -> None:
        for part in inner_optimizers(optimizer):
            if not part.optimizer.state:  # before the first step; in fp16 the first steps may overflow
                part.init_state_fn(part.optimizer, part.config)
        state = optimizer.sharded_state_dict(models, is_loading=loading, metadata={**metadata, **METADATA})
        self._chained = len(optimizer.chained_optimizers) > 1
        self._parts = [state[number] for number in range(len(state))] if self._chained else [state]
        self.tensors = {_text(path): leaf for path, leaf in _leaves(self._parts) if isinstance(leaf, ShardedBase)}

    @property
    def common(self) -> dict[str, Any]:
        """State that is not a tensor: `step`, and `grad_scaler` with fp16."""
        steps = [leaf for path, leaf in _leaves(self._parts) if path[-1] == "step" and "param_groups" in path]
        scalers = [part["grad_scaler"] for part in self._parts if "grad_scaler" in part]
        return {"step": max(steps, default=0), "grad_scaler": scalers[0] if scalers else None}

    def filled(self, tensors: Mapping[str, Any], common: Mapping[str, Any]) -> Any:
        """The argument of the optimizer's `load_state_dict`, from the loaded `tensors` and `common`."""
        parts = _filled(self._parts, (), tensors, common["step"])
        for part in parts:
            if "grad_scaler" in part and common["grad_scaler"] is not None:
                part["grad_scaler"] = common["grad_scaler"]
        return parts if self._chained else parts[0]


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def _filled(value: Any, path: Path, tensors: Mapping[str, Any], step: int) -> Any:
    if isinstance(value, dict):
        made = {key: _filled(inner, (*path, key), tensors, step) for key, inner in value.items()}
        return made | {"step": step} if "param_groups" in path[-2:-1] else made
    if isinstance(value, list):
        return [_filled(inner, (*path, number), tensors, step) for number, inner in enumerate(value)]
    if isinstance(value, LocalNonpersistentObject):  # the parameters of a group
        return value.unwrap()
    return tensors[_text(path)] if isinstance(value, ShardedBase) else value
