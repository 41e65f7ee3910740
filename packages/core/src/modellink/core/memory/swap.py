# SPDX-License-Identifier: Apache-2.0
"""Offloads the activations of the named modules to host memory in the forward pass and prefetches them in the backward pass
(`--swap-attention`).

Copies between pinned host memory and the device run on a separate stream. A storage is moved as a unit, once for all
saved tensors in it; parameters and the rotary angles shared by all layers stay on the device. On a CPU host and
device are the same memory, so the copies are made but save nothing.

Not here: layers that are recomputed in full, which only keep their input, and offloading the optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from modellink.core import engine
from modellink.core.config.memory import MemoryConfig

SMALLEST = 1 << 16  # bytes; on an accelerator a smaller storage is not worth a copy
Observer = Callable[[str, int, torch.UntypedStorage], None]
"""Called with every move: "out" or "in", number of the layer in its chunk, moved storage."""


class _Lane:
    """Copies between device and host, concurrent with computation on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = None if device.type == "cpu" else getattr(torch, device.type)
        self.stream = self.module.Stream() if self.module else None
        self.smallest = SMALLEST if self.module else 0

    def out(self, x: Tensor) -> Tensor:
        if self.module is None or self.stream is None:
            return x.clone()
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(self.module.current_stream())
        with self.module.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not reused before the copy is done
        return host

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """The copy, and the event to wait for before it is used."""
        if self.module is None or self.stream is None:
            return host, None
        with self.module.stream(self.stream):
            return host.to(self.device, non_blocking=True), self.stream.record_event()

    def wait(self, x: Tensor, event: Any) -> None:
        if event is not None:
            self.module.current_stream().wait_event(event)  # type: ignore[union-attr]
            x.record_stream(self.module.current_stream())  # type: ignore[union-attr]


class _Moved:
    """One storage on the host or on its way back; `uses` counts the saved tensors in it."""

    def __init__(self, bytes_: Tensor, lane: _Lane) -> None:
        self.lane, self.uses = lane, 0
        self.host: Tensor | None = lane.out(bytes_)
        self.device: tuple[Tensor, Any] | None = None

    def fetch(self) -> bool:
        """Start to copy it back; False if that has been done or it is no longer needed."""
        if self.device is not None or self.host is None:
            return False
        self.device = self.lane.back(self.host)
        return True

    def take(self) -> Tensor:
        self.fetch()
        assert self.device is not None
        bytes_, event = self.device
        self.lane.wait(bytes_, event)
        self.uses -= 1
        if not self.uses:
            self.host = self.device = None
        return bytes_


class _Pass:
    """What one layer saves in one forward pass; `below` is the pass of the layer that runs backward after it."""

    def __init__(self, below: _Pass | None) -> None:
        self.below: _Pass | None = below
        self.moved: list[_Moved] = []
        self.known: dict[tuple[int, int], tuple[_Moved, torch.UntypedStorage]] = {}


class _Chain:
    """The layers of a model chunk; `last` is the pass of the layer that ran forward last."""

    def __init__(self, decoder: Any) -> None:
        self.last: _Pass | None = None
        decoder.register_forward_pre_hook(self._restart)

    def _restart(self, *_: Any) -> None:
        self.last = None


class _Layer:
    """Offloads the saved tensors of modules of one layer."""

    def __init__(self, layer: Any, number: int, chain: _Chain, lane: _Lane, observe: Observer | None) -> None:
        self.layer, self.number, self.chain, self.lane, self.observe = layer, number, chain, lane, observe
        self.going: _Pass | None = None
        self.staying: set[int] = set()
        layer.register_forward_pre_hook(self._begin)
        layer.register_forward_hook(self._end)

    def wrap(self, module: nn.Module) -> None:
        forward = module.forward

        def moving(*args: Any, **kwargs: Any) -> Any:
            if self.going is None:
                return forward(*args, **kwargs)
            with saved_tensors_hooks(self._pack, self._unpack):
                return forward(*args, **kwargs)
        module.forward = moving

    def _begin(self, _: Any, args: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.chain.last = self.going = _Pass(self.chain.last)
        self.staying = {parameter.untyped_storage().data_ptr() for parameter in self.layer.parameters()}

    def _end(self, _: Any, args: Any, output: Any) -> None:
        if (done := self.going) is None:
            return
        self.going, done.known = None, {}  # releases device memory that nothing else refers to
        number, before = self.number, done.below

        def ahead(_: Tensor) -> None:
            self._fetch(done, number)
            if before is not None:
                self._fetch(before, number - 1)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(ahead)

    def _fetch(self, kept: _Pass, number: int) -> None:
        for moved in kept.moved:
            if moved.fetch() and self.observe and moved.device:
                self.observe("in", number, moved.device[0].untyped_storage())

    def _pack(self, tensor: Tensor) -> Any:
        storage, angles = tensor.untyped_storage(), self.layer.self_attention.rotary.angles
        place = storage.data_ptr()
        if self.going is None or tensor.device != self.lane.device or storage.nbytes() <= self.lane.smallest or (
                place in self.staying or any(place == angle.untyped_storage().data_ptr() for angle in angles)):
            return tensor if tensor.grad_fn is None else tensor.detach()  # a saved output must not keep its own graph alive
        key = (place, tensor._version)
        if key not in self.going.known:
            bytes_ = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self.going.known[key] = _Moved(bytes_, self.lane), storage
            self.going.moved.append(self.going.known[key][0])
            if self.observe:
                self.observe("out", self.number, storage)
        moved, _ = self.going.known[key]
        moved.uses += 1
        return moved, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        moved, dtype, offset, shape, stride = kept
        bytes_ = moved.take()
        return torch.empty(0, dtype=dtype, device=bytes_.device).set_(bytes_.untyped_storage(), offset, shape, stride)


def swap(models: Sequence[nn.Module], memory: MemoryConfig, observe: Observer | None = None) -> None:
    """Offload the activations of the configured modules in all layers that are not recomputed in full."""
    if not memory.swap_attention:
        return
    lane = _Lane(engine.current_device())
    for chunk, model in enumerate(models):
        decoder: Any = model.get_submodule("decoder")
        chain, whole = _Chain(decoder), memory.recomputed_in_full(chunk, len(models)) or 0
        for number, layer in enumerate(decoder.layers):
            if number >= whole:
                kept = _Layer(layer, number, chain, lane, observe)
                for name in memory.swap_module_names:
                    kept.wrap(getattr(layer, name))
