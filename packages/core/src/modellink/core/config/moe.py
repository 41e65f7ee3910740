"""How a mixture of experts is trained: balance of the experts, and how tokens reach them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
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
    moe_permutation_async_comm: bool = option(
        False, "Send hidden states, scores and their routing to the experts' ranks at the same time.")
    moe_grouped_gemm: bool = option(False, "The experts of a rank are one grouped matrix product, not one after the other.")
    moe_expert_capacity_factor: float | None = option(
        None, "An expert takes so many times its even share of a micro batch's tokens, and the rest passes it by; all where "
        "nothing is said.")
    moe_token_drop_policy: Literal["probs", "position"] = option("probs", "Who passes it by: small scores, or the last.")
    moe_pad_expert_input_to_capacity: bool = option(False, "Every expert takes exactly its capacity, filled up with zeros.")

    @property
    def capacity_factor(self) -> float | None:
        """None where no token is dropped; the original says so with a negative number, too."""
        factor = self.moe_expert_capacity_factor
        return None if factor is None or factor < 0 else factor

    def check(self) -> None:
        if self.capacity_factor is not None and self.moe_token_dispatcher_type != "alltoall":
            raise ModelLinkError(f"the dispatcher {self.moe_token_dispatcher_type} does not know experts with a capacity",
                                 where="--moe-expert-capacity-factor, --moe-token-dispatcher-type",
                                 fix="use --moe-token-dispatcher-type alltoall")
        if self.capacity_factor is None and self.moe_pad_expert_input_to_capacity:
            raise ModelLinkError("experts have no capacity to be filled", where="--moe-pad-expert-input-to-capacity",
                                 fix="give one with --moe-expert-capacity-factor")
