"""Joining attention over two sets of keys (as in flash attention, Dao et al. 2022): the step of ring attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modellink.kernels.ops.door import form_of


def ring_update(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over both sets of keys, from the attention over each.

    Args:
        out, new_out: [seq, batch, heads, dim], fp32.
        lse, new_lse: [seq, batch, heads], logarithm of the sum of exponentiated scores; -inf where no key was seen.
    """
    return form_of("ring_update", out.device.type, FORMS, plain)(out, lse, new_out, new_lse)


def plain(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.logaddexp(lse, new_lse)
    finite = joined.clamp(min=torch.finfo(joined.dtype).min)  # -inf minus -inf would be NaN
    weight, new_weight = (lse - finite).exp(), (new_lse - finite).exp()
    return out * weight.unsqueeze(-1) + new_out * new_weight.unsqueeze(-1), joined


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
