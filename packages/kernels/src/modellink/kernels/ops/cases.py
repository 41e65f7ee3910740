# SPDX-License-Identifier: Apache-2.0
"""Calls of every op in each of its uses, on fixed inputs, for comparing a device's form with the plain one.

`alone` returns the ops of one process, `joined` the ops over the ranks of a group. Not here: the allowed
differences (check.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops import matmul_collective
from modellink.kernels.ops.adamw import Settings
from modellink.kernels.ops.attention import Documents, Variant, alibi_slopes
from modellink.kernels.ops.attention_block import plain as plain_block
from modellink.kernels.ops.attention_block import plain_gradients
from modellink.kernels.ops.rotary import plain, plain_interleaved

Form = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One use of an op.

    Attributes:
        op: its name in `kernels.ops`.
        use: what is special about this use; empty for the ordinary one.
        run: takes the op or its plain form and returns the results and their gradients.
    """

    op: str
    use: str
    run: Callable[[Form], list[Tensor]]

    @property
    def name(self) -> str:
        return f"{self.op}: {self.use}" if self.use else self.op

    def dispatched(self) -> list[Tensor]:
        """Run the form of the device the inputs are on."""
        return self.run(getattr(importlib.import_module("modellink.kernels.ops"), self.op))

    def plain(self) -> list[Tensor]:
        return self.run(plain_form(self.op))


def plain_form(op: str) -> Form:
    """Return the plain form, with the arguments of the op."""
    if op in JOINED:
        return partial(JOINED[op], forms=matmul_collective.PLAIN)
    if op == "rotary":
        return _plain_rotary
    if op == "attention_block_gradients":
        return plain_gradients
    form: Form = importlib.import_module(f"modellink.kernels.ops.{op}").plain
    return form


def _plain_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    turned, rest = x.split([cos.size(-1), x.size(-1) - cos.size(-1)], dim=-1)
    return torch.cat([(plain_interleaved if interleaved else plain)(turned, cos, sin), rest], dim=-1)


JOINED: dict[str, Form] = {form.__name__: form for form in (
    matmul_collective.all_gather_matmul, matmul_collective.matmul_reduce_scatter,
    matmul_collective.matmul_all_reduce)}


def with_gradients(results: Tensor | tuple[Tensor, ...], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the results, and the gradients of their weighted sum, in which every element has another weight."""
    results = results if isinstance(results, tuple) else (results,)
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in results]
    wanted = [x for x in inputs if x.requires_grad]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, wanted, weights)]


class _Inputs:
    """Random tensors, the same in every process and on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(*shape, generator=self.generator)
        return made.to(self.device, dtype or self.dtype).requires_grad_()

    def angles(self, *shape: int, neighbors: bool = False) -> tuple[Tensor, Tensor]:
        """Return cos and sin [..., 2 x the last size], each angle once per dimension of its pair."""
        angle = torch.randn(*shape, generator=self.generator)
        angle = angle.repeat_interleave(2, -1) if neighbors else torch.cat([angle, angle], -1)
        return angle.cos().to(self.device, self.dtype), angle.sin().to(self.device, self.dtype)

    def heads(self, seq: int = 9, batch: int = 2, dim: int = 16, value_dim: int = 16, keys: int | None = None,
              heads: int = 6) -> list[Tensor]:
        """Return queries, keys and values with half as many groups as heads."""
        return [self.random(seq, batch, heads, dim), self.random(keys or seq, batch, heads // 2, dim),
                self.random(keys or seq, batch, heads // 2, value_dim)]


def alone(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Return the ops of one process."""
    made = _Inputs(device, dtype)
    return [*_rows(made), *_rotary(made), *_attention(made), *_blocks(made), *_others(made)]


def _case(op: str, use: str, inputs: Sequence[Tensor], **options: Any) -> Case:
    return Case(op, use, lambda form: with_gradients(form(*inputs, **options), inputs))


def _rows(made: _Inputs) -> list[Case]:
    x, weight = made.random(7, 3, 48), made.random(48)
    labels = torch.randint(0, 48, (7, 3), generator=made.generator).to(made.device)
    return [_case("rms_norm", "", (x, weight), epsilon=1e-5), _case("swiglu", "", (x,)),
            _case("cross_entropy", "", (x, labels))]


def _rotary(made: _Inputs) -> list[Case]:
    x = made.random(9, 2, 6, 16)
    return [_case("rotary", "", (x, *made.angles(9, 1, 1, 8))),
            _case("rotary", "part of a head", (x, *made.angles(9, 1, 1, 4))),
            _case("rotary", "positions by row", (x, *made.angles(9, 2, 1, 8))),
            _case("rotary", "neighbors", (x, *made.angles(9, 1, 1, 8, neighbors=True)), interleaved=True),
            _case("rotary", "neighbors, positions by row", (x, *made.angles(9, 2, 1, 8, neighbors=True)),
                  interleaved=True)]


def _attention(made: _Inputs) -> list[Case]:
    device, causal = made.device, Variant(0.25)
    documents = Documents(torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3, 8], [0, 0, 0, 0, 0, 5, 5, 5, 5]]).to(device))
    documents.__dict__["ends"] = [3, 8, 9, 14, 18]  # the value it computes, without reading the tensor
    places = torch.tensor([[3, 4], [6, 7]]).to(device)
    slopes = alibi_slopes(6).to(device)
    qkv, narrow, cached, long = (made.heads(), made.heads(value_dim=12), made.heads(seq=2, keys=8),
                                 made.heads(seq=2112, batch=1, heads=2))
    window = replace(causal, window=4)

    def case(use: str, variant: Variant, inputs: Sequence[Tensor] = qkv,
             positions: Tensor | None = None) -> Case:
        return _case("attention", use, inputs, variant=variant, positions=positions)

    return [case("causal", causal), case("window", window),
            case("window wider than the sequence", replace(causal, window=20)),
            case("packed", replace(causal, documents=documents)),
            case("packed, window", replace(window, documents=documents)),
            case("narrow values", causal, narrow), case("longer than the mask", causal, long),
            case("longer than the mask, window", replace(causal, window=2080), long),
            case("over a cache", causal, cached, places),
            case("over a cache, window", window, cached, places),
            case("soft cap", replace(causal, softcap=0.7)), case("alibi", replace(causal, slopes=slopes)),
            case("packed, soft cap", replace(causal, softcap=0.7, documents=documents))]


def _blocks(made: _Inputs) -> list[Case]:
    """The full result and log-sum-exp are those of the keys given twice."""
    query, key, value = (x.detach() for x in made.heads())
    gradient = made.random(9, 2, 6, 16).detach()
    out, lse = plain_block(query, torch.cat([key, key]), torch.cat([value, value]), 0.25, causal=False)

    def case(op: str, causal: bool, inputs: Sequence[Tensor]) -> Case:
        return Case(op, "causal" if causal else "", lambda form: list(form(*inputs, 0.25, causal=causal)))
    return [case(op, causal, inputs) for causal in (False, True) for op, inputs in (
        ("attention_block", (query, key, value)),
        ("attention_block_gradients", (gradient, query, key, value, out, lse)))]


def _others(made: _Inputs) -> list[Case]:
    single = torch.float32
    outs = [made.random(9, 2, 6, 16, dtype=single) for _ in range(2)]
    sums = [made.random(9, 2, 6, dtype=single) for _ in range(2)]
    unseen = torch.full((9, 2, 6), float("-inf"), device=made.device)
    nothing = torch.zeros_like(outs[0])
    rows, counts = made.random(12, 16), [5, 0, 4, 3]
    block = made.random(4, 8, 16)
    apart = [made.random(8, 16) for _ in range(4)]
    state = [made.random(5, 8, dtype=single).detach().abs() for _ in range(4)]
    many, few, matrix = made.random(40, 3, 24), made.random(3, 24), made.random(20, 24)

    def grouped(use: str, matrices: Callable[[], Sequence[Tensor]], learned: Sequence[Tensor]) -> Case:
        return Case("grouped_matmul", use,
                    lambda form: with_gradients(form(rows, matrices(), counts), (rows, *learned)))

    def stepped(use: str, settings: Settings) -> Case:
        def run(form: Form) -> list[Tensor]:
            copies = [[tensor.clone()] for tensor in state]
            form(*copies, settings)
            return [tensor for (tensor,) in copies]
        return Case("adamw", use, run)

    step = Settings(step=3, lr=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    return [_case("linear", "", (many, matrix)), _case("linear", "few rows", (few, matrix)),
            _case("ring_update", "", (outs[0], sums[0], outs[1], sums[1])),
            Case("ring_update", "no key seen",
                 lambda form: list(form(nothing, unseen, outs[1].detach(), sums[1].detach()))),
            Case("ring_update", "no key ever seen",
                 lambda form: list(form(nothing, unseen, nothing, unseen))),
            grouped("in one block", block.unbind, (block,)), grouped("apart", lambda: apart, apart),
            stepped("", step), stepped("decay in the gradient", replace(step, decoupled=False))]


def joined(device: torch.device, dtype: torch.dtype, group: Any) -> list[Case]:
    """Return the ops over a group; every rank has other inputs, and the same gradient if all have the same
    result."""
    made = _Inputs(device, dtype)
    made.generator.manual_seed(5 + group.rank())
    rows = 4 * group.size()
    x, weight = made.random(rows, 272), made.random(256, 272)
    with torch.no_grad():
        weight.mul_(272 ** -0.5)
    small, cut = made.random(rows, 24), made.random(20, 24)
    return [_case(op, use, inputs, group=group) for op in JOINED
            for use, inputs in (("", (x, weight)), ("inner size below 256", (small, cut)))]
