# SPDX-License-Identifier: Apache-2.0
"""How a run is split across processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import VirtualLayoutOptions
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout


@dataclass(frozen=True)
class ParallelConfig(VirtualLayoutOptions):
    heading: ClassVar[str] = "Parallelism"

    context_parallel_size: int = option(
        1, "Context parallel size: ranks that each sequence is sharded across.", short="--cp", minimum=1)
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = option(
        "ulysses_cp_algo", "Algorithm of context-parallel attention: all-to-all over heads (Ulysses), ring attention, or Ulysses "
        "within a ring.")
    ulysses_degree_in_cp: int | None = option(
        None, "hybrid_cp_algo: size of each Ulysses group; a divisor of the context parallel size.", minimum=2)
    use_cp_send_recv_overlap: bool = option(
        True, "Ring attention: overlap sending keys and values with computation, with separate groups for send and receive.")
    kv_head_repeat_before_uly_alltoall: bool = option(
        False, "Ulysses: repeat keys and values for every query head before the all-to-all. Default: only as often as needed "
        "to split them across ranks.")
    sequence_parallel: bool = option(
        False, "Shard norms, dropout and residuals by sequence across the tensor-parallel ranks.")
    use_mc2: bool = option(
        False, "Fuse matrix products of linears with the tensor-parallel collective before or after them (on NPUs).")
    use_distributed_optimizer: bool = option(False, "Shard the optimizer state across the data-parallel ranks.")
    overlap_grad_reduce: bool = option(False, "Overlap the gradient reduction with the backward pass.")
    overlap_param_gather: bool = option(
        False, "Overlap the parameter all-gather of the distributed optimizer with the forward pass.")
    make_vocab_size_divisible_by: int = option(128, "Pad the vocabulary to a multiple of this x TP.", minimum=1)
    nproc_per_node: int | None = option(
        None, "Processes to start on this machine. Default: TP x PP x CP x EP. Not used under torchrun.", minimum=1)
    device: Literal["auto", "cpu", "cuda", "npu"] = option("auto", "Device to run on.")
    distributed_timeout_minutes: int = option(45, "Timeout of collectives.", unit="minutes", minimum=1)

    def processes(self) -> int:
        """Number of processes to start on this machine."""
        return self.nproc_per_node or self.model_ranks * self.expert_model_parallel_size

    @property
    def _ulysses(self) -> int:
        """Size of the groups that exchange heads for tokens."""
        cp = self.context_parallel_size
        return {"ulysses_cp_algo": cp, "megatron_cp_algo": 1}.get(self.context_parallel_algo, self.ulysses_degree_in_cp or 1)

    def one_model(self) -> ParallelLayout:
        return replace(super().one_model(), cp=self.context_parallel_size, ulysses=self._ulysses)

    def check(self) -> None:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size < 2:
            raise ModelLinkError("virtual pipeline stages need a pipeline parallel size of at least 2",
                                 where="--num-layers-per-virtual-pipeline-stage",
                                 fix="remove it, or use --pipeline-model-parallel-size 2 or more")
        cp, degree, hybrid = self.context_parallel_size, self.ulysses_degree_in_cp, self.context_parallel_algo == "hybrid_cp_algo"
        if hybrid and cp > 1 and (degree is None or cp % degree or degree == cp):
            raise ModelLinkError(f"context parallel size {cp} cannot be split into Ulysses groups of {degree} ranks",
                                 where="--ulysses-degree-in-cp, --context-parallel-size",
                                 fix="use a smaller divisor of the context parallel size")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ModelLinkError("--overlap-param-gather needs the distributed optimizer with overlapped gradient reduction",
                                 where="--overlap-param-gather",
                                 fix="add --use-distributed-optimizer and --overlap-grad-reduce")
        if degree is not None and not hybrid:
            raise ModelLinkError(f"--ulysses-degree-in-cp applies to hybrid_cp_algo, not to {self.context_parallel_algo}",
                                 where="--ulysses-degree-in-cp, --context-parallel-algo")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ModelLinkError("--sequence-parallel needs a tensor parallel size of at least 2",
                                 where="--sequence-parallel", fix="remove it, or use --tensor-model-parallel-size 2 or more")
        if self.use_mc2 and self.tensor_model_parallel_size == 1:
            raise ModelLinkError("--use-mc2 needs a tensor parallel size of at least 2",
                                 where="--use-mc2", fix="remove it, or use --tensor-model-parallel-size 2 or more")
