"""How a mixture of experts is trained: balance of the experts, and how tokens reach them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modellink.kernels.options import option


@dataclass(frozen=True)
class MoEConfig:
    section: ClassVar[str] = "moe"

    moe_aux_loss_coeff: float = option(0.0, "Weight of the loss that keeps experts evenly used.", minimum=0)
    seq_aux: bool = option(False, "Take that loss of each sequence, not of a micro batch.")
    moe_device_level_aux_loss_coeff: float = option(0.0, "Weight of the same for groups of experts (DeepSeek-V2).", minimum=0)
    moe_comm_aux_loss_coeff: float = option(0.0, "Weight of the loss on what is sent to each group (DeepSeek-V2).", minimum=0)
    moe_z_loss_coeff: float = option(0.0, "Weight of the squared size of the router's logits (ST-MoE).", minimum=0)
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = option("allgather", "How tokens reach experts on other ranks.")
