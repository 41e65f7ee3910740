# SPDX-License-Identifier: Apache-2.0
"""Products joined with a collective over two real processes equal products of unsharded matrices, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modellink.kernels import ops

ROWS, INNER, OUTER = 6, 8, 10


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (ROWS, INNER), "w": (OUTER, INNER), "up": (ROWS, OUTER)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def rank(number: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    rows, inner, outer = (slice(number * size // 2, (number + 1) * size // 2) for size in (ROWS, INNER, OUTER))
    x, w = given["x"][rows].detach().requires_grad_(), given["w"][outer].detach().requires_grad_()  # a column-parallel linear
    gathered = ops.all_gather_matmul(x, w, dist.group.WORLD)
    made = [gathered, *torch.autograd.grad(gathered, [x, w], given["up"][:, outer])]
    x, w = given["x"][:, inner].detach().requires_grad_(), given["w"][:, inner].detach().requires_grad_()  # a row-parallel one
    scattered = ops.matmul_reduce_scatter(x, w, dist.group.WORLD)
    made += [scattered, *torch.autograd.grad(scattered, [x, w], given["up"][rows])]
    reduced = ops.matmul_all_reduce(x, w, dist.group.WORLD)
    made += [reduced, *torch.autograd.grad(reduced, [x, w], given["up"])]
    results.put((number, [tensor.detach().numpy() for tensor in made]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    out = given["x"] @ given["w"].t()
    of_x, of_w = torch.autograd.grad(out, [given["x"], given["w"]], given["up"])
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank, args=(str(tmp_path / "store"), results), nprocs=2)
    for _ in range(2):
        number, made = results.get()
        rows, inner, outer = (slice(number * size // 2, (number + 1) * size // 2) for size in (ROWS, INNER, OUTER))
        expected = [out[:, outer], of_x[rows], of_w[outer], out[rows], of_x[:, inner], of_w[:, inner],
                    out, of_x[:, inner], of_w[:, inner]]
        for found, wanted in zip(made, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted.detach(), atol=1e-5, rtol=1e-5)
