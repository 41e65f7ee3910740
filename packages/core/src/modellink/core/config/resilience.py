# SPDX-License-Identifier: Apache-2.0
"""What a run does when a rank or a machine fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modellink.core.config.faults import read_faults
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class ResilienceConfig:
    heading: ClassVar[str] = "High availability"

    enable_high_availability: bool = option(
        False, "When a rank fails, the surviving ranks save the training state and the run restarts from it; with "
        "--use-distributed-optimizer each half of the data-parallel ranks holds the full optimizer state.")
    enable_optimizer_state_local_copy: bool = option(
        False, "Keep a copy of weights and optimizer state in host memory, so that a step is undone and repeated when device "
        "memory fails.")
    max_restarts: int = option(10, "Maximum number of restarts.", minimum=0)
    hang_timeout: float = option(
        1800.0, "Time without a finished step after which a rank counts as failed.", unit="seconds", minimum=1)
    nnodes: str = option("1", "Number of machines, or MIN:MAX of them, of a run with high availability.")
    rdzv_endpoint: str | None = option(None, "HOST:PORT of the first machine, the same on all machines.")
    rdzv_id: str = option("modellink", "Name of the run at --rdzv-endpoint.")
    inject_fault: str | None = option(
        None, "Inject faults for testing, e.g. kind=kill,step=3,rank=1; separate several with ;. Kinds: exception, kill, hang, "
        "nan, corrupt, memory, disk, slow.")

    @property
    def nodes(self) -> tuple[int, int]:
        """Minimum and maximum number of machines."""
        low, _, high = self.nnodes.partition(":")
        return int(low), int(high or low)

    def check(self) -> None:
        try:
            low, high = self.nodes
        except ValueError:
            raise ModelLinkError(f"--nnodes {self.nnodes} is not a number or MIN:MAX", where="--nnodes",
                                 fix="e.g. 2, or 2:4") from None
        if not 1 <= low <= high:
            raise ModelLinkError(f"--nnodes {self.nnodes}: the minimum must be at least 1 and at most the maximum",
                                 where="--nnodes", fix="e.g. 2, or 2:4")
        if high > 1 and self.rdzv_endpoint is None:
            raise ModelLinkError("a run on several machines needs a rendezvous endpoint", where="--nnodes, --rdzv-endpoint",
                                 fix="set --rdzv-endpoint to HOST:PORT of the first machine, on all machines")
        needs = {"--enable-optimizer-state-local-copy": self.enable_optimizer_state_local_copy, "--nnodes": high > 1,
                 "--inject-fault": self.inject_fault is not None}
        for flag, given in needs.items():
            if given and not self.enable_high_availability:
                raise ModelLinkError(f"{flag} needs --enable-high-availability", where=flag, fix="add --enable-high-availability")
        read_faults(self.inject_fault)
