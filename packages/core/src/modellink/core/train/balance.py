# SPDX-License-Identifier: Apache-2.0
"""The load-balancing losses of an iteration for the log, without their coefficients.

megatron-core's routers record them per layer; this module reduces them over ranks and clears the record.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.config import MoEConfig
from modellink.core.engine import current_device


def names(spec: ModelSpec, moe: MoEConfig) -> list[str]:
    """Names of the losses that the routers record, as in megatron-core and model/router.py."""
    if spec.num_experts is None:
        return []
    groups = bool(spec.moe_router_num_groups)
    noted = {"load_balancing_loss": moe.moe_aux_loss_coeff and not moe.seq_aux,
             "seq_load_balancing_loss": moe.moe_aux_loss_coeff and moe.seq_aux,
             "device_level_loss": moe.moe_device_level_aux_loss_coeff and groups,
             "communication_loss": moe.moe_comm_aux_loss_coeff and groups, "z_loss": moe.moe_z_loss_coeff}
    return [name for name, is_noted in noted.items() if is_noted]


def balance_losses(spec: ModelSpec, moe: MoEConfig, num_microbatches: int) -> dict[str, Tensor]:
    """Means over layers of experts and micro batches since the last call; every rank calls it."""
    wanted = names(spec, moe)
    if not wanted:
        return {}
    tracker = get_moe_layer_wise_logging_tracker()
    for name in wanted:  # a stage without experts has recorded none, and takes part in the reduction
        if name not in tracker:
            zeros = torch.zeros(spec.num_layers, device=current_device())
            tracker[name] = {"values": zeros, "reduce_group": None, "avg_group": None, "reduce_group_has_dp": False}
    if "z_loss" in wanted:  # each rank has the mean over its own tokens, which megatron-core does not reduce
        tracker["z_loss"]["avg_group"] = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    reduce_aux_losses_tracker_across_ranks(wanted)
    layers = sum(layer.experts is not None for layer in spec.layers)
    found = {name: tracker[name]["values"].sum() / layers / num_microbatches for name in wanted}
    clear_aux_losses_tracker()
    return found
