# SPDX-License-Identifier: Apache-2.0
"""How a mixture of experts is trained: load balancing and token dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class MoEConfig:
    heading: ClassVar[str] = "Experts"

    moe_aux_loss_coeff: float = option(0.0, "Coefficient of the load-balancing loss.", minimum=0)
    seq_aux: bool = option(False, "Compute the load-balancing loss per sequence instead of per micro batch.")
    moe_device_level_aux_loss_coeff: float = option(0.0, "Coefficient of the device-level balance loss (DeepSeek-V2).", minimum=0)
    moe_comm_aux_loss_coeff: float = option(0.0, "Coefficient of the communication balance loss (DeepSeek-V2).", minimum=0)
    moe_z_loss_coeff: float = option(0.0, "Coefficient of the router z-loss (ST-MoE).", minimum=0)
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = option(
        "allgather", "Collective that sends tokens to experts on other ranks.")
    moe_permutation_async_comm: bool = option(
        False, "Overlap the transfers of hidden states, scores and routing to the experts' ranks.")
    moe_grouped_gemm: bool = option(False, "Compute the experts of a rank as one grouped matrix product.")
    moe_expert_capacity_factor: float | None = option(
        None, "Capacity of an expert as a multiple of its even share of a micro batch's tokens; further tokens skip the "
        "expert. Default: unlimited.")
    moe_token_drop_policy: Literal["probs", "position"] = option(
        "probs", "Which tokens are dropped beyond the capacity: low scores, or last positions.")
    moe_pad_expert_input_to_capacity: bool = option(False, "Pad the input of every expert with zeros to its capacity.")

    @property
    def capacity_factor(self) -> float | None:
        """None if no token is dropped; the original also writes this as a negative number."""
        factor = self.moe_expert_capacity_factor
        return None if factor is None or factor < 0 else factor

    def check(self) -> None:
        if self.moe_expert_capacity_factor == 0:
            raise ModelLinkError("experts with a capacity of 0 would drop every token", where="--moe-expert-capacity-factor",
                                 fix="use a positive factor, or remove the option", option="moe_expert_capacity_factor")
        if self.capacity_factor is not None and self.moe_token_dispatcher_type != "alltoall":
            raise ModelLinkError(f"the {self.moe_token_dispatcher_type} dispatcher does not support an expert capacity",
                                 where="--moe-expert-capacity-factor, --moe-token-dispatcher-type",
                                 fix="use --moe-token-dispatcher-type alltoall")
        if self.capacity_factor is None and self.moe_pad_expert_input_to_capacity:
            raise ModelLinkError("--moe-pad-expert-input-to-capacity needs a capacity",
                                 where="--moe-pad-expert-input-to-capacity", fix="set --moe-expert-capacity-factor")
