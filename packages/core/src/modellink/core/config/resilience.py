"""What a run does when something fails under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modellink.core.config.faults import read_faults
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class ResilienceConfig:
    section: ClassVar[str] = "resilience"

    enable_high_availability: bool = option(
        False, "When a rank fails, the others save what they hold and the run starts again from it; with "
        "--use-distributed-optimizer each half of the data-parallel ranks holds all of its state.")
    enable_optimizer_state_local_copy: bool = option(
        False, "Keep the weights and the optimizer's state once more in host memory, so that a step in which a device's memory "
        "failed is undone and done again.")
    max_restarts: int = option(10, "How often a run is started again.", minimum=0)
    hang_timeout: float = option(1800.0, "A rank that finishes no step for so long has failed.", unit="seconds", minimum=1)
    nnodes: str = option("1", "Machines of a run with high availability, or fewest:most of them.")
    rdzv_endpoint: str | None = option(None, "Where they meet: host:port of the first of them, which starts the run there.")
    rdzv_id: str = option("modellink", "Name of the run there.")
    inject_fault: str | None = option(
        None, "For trials, e.g. kind=kill,step=3,rank=1; several with ; between. Kinds: exception, kill, hang, nan, corrupt, "
        "memory, disk, slow.")

    @property
    def nodes(self) -> tuple[int, int]:
        """The fewest and the most machines."""
        low, _, high = self.nnodes.partition(":")
        return int(low), int(high or low)

    def check(self) -> None:
        try:
            low, high = self.nodes
        except ValueError:
            raise ModelLinkError(f"{self.nnodes!r} is no number of machines", where="--nnodes", fix="e.g. 2, or 2:4") from None
        if not 1 <= low <= high:
            raise ModelLinkError(f"{low} to {high} machines are none", where="--nnodes", fix="e.g. 2, or 2:4")
        if high > 1 and self.rdzv_endpoint is None:
            raise ModelLinkError("several machines have to know where to meet", where="--nnodes, --rdzv-endpoint",
                                 fix="give host:port of the first machine, the same on all of them")
        needs = {"--enable-optimizer-state-local-copy": self.enable_optimizer_state_local_copy, "--nnodes": high > 1,
                 "--inject-fault": self.inject_fault is not None}
        for flag, given in needs.items():
            if given and not self.enable_high_availability:
                raise ModelLinkError("this is a part of high availability", where=flag, fix="add --enable-high-availability")
        read_faults(self.inject_fault)
