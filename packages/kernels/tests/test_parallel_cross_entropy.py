# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a vocabulary sharded across two real processes equals the unsharded one, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modellink.kernels import ops


def rank(number: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    whole, labels, weight = inputs()
    mine = whole[..., number * 6: number * 6 + 6].clone().requires_grad_()
    loss = ops.cross_entropy(mine, labels, dist.group.WORLD)
    (grad,) = torch.autograd.grad(loss, mine, weight)
    results.put((number, loss.detach().numpy(), grad.numpy()))
    dist.barrier()
    dist.destroy_process_group()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(4, 3, 12, generator=generator) * 5, torch.randint(0, 12, (4, 3), generator=generator),
            torch.rand(4, 3, generator=generator))


def test_two_ranks_equal_one(tmp_path):
    whole, labels, weight = inputs()
    whole.requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(4, 3)
    (gradient,) = torch.autograd.grad(expected, whole, weight)
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank, args=(str(tmp_path / "store"), results), nprocs=2)
    for _ in range(2):
        number, loss, grad = results.get()
        torch.testing.assert_close(torch.from_numpy(loss), expected.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(torch.from_numpy(grad), gradient[..., number * 6: number * 6 + 6], atol=1e-6, rtol=1e-6)
