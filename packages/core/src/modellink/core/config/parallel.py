"""How a run is cut over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import VirtualLayoutOptions
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout


@dataclass(frozen=True)
class ParallelConfig(VirtualLayoutOptions):
    section: ClassVar[str] = "parallel"

    context_parallel_size: int = option(1, "Ranks each sequence is cut over.", alias="--cp", minimum=1)
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = option(
        "ulysses_cp_algo", "How attention sees a whole sequence: ranks exchange heads for tokens, pass keys and values round a "
        "ring, or the first inside the second.")
    ulysses_degree_in_cp: int | None = option(None, "hybrid_cp_algo: ranks that exchange heads for tokens.", minimum=2)
    use_cp_send_recv_overlap: bool = option(
        True, "Pass keys and values, and their gradients, on while computing, sends and receipts in groups of their own.")
    kv_head_repeat_before_uly_alltoall: bool = option(
        False, "Repeat keys and values for every query head before the exchange, not only until they can be dealt.")
    sequence_parallel: bool = option(False, "Cut norms and dropouts by sequence over the tensor-parallel ranks.")
    use_mc2: bool = option(
        False, "Let the matrix products of a layer's linears gather and scatter the sequence, or, without sequence parallelism, "
        "sum over the tensor-parallel ranks (fused on NPUs).")
    use_distributed_optimizer: bool = option(False, "Cut the optimizer state over the data-parallel ranks.")
    overlap_grad_reduce: bool = option(False, "Sum gradients over the data-parallel ranks while the backward pass goes on.")
    overlap_param_gather: bool = option(False, "Gather the distributed optimizer's parameters while the forward pass goes on.")
    make_vocab_size_divisible_by: int = option(128, "The vocabulary is padded to a multiple of this x TP.", minimum=1)
    nproc_per_node: int | None = option(
        None, "Processes to start on this machine; TP x PP x CP x EP where nothing is said. Not used under torchrun.",
        minimum=1)
    device: Literal["auto", "cpu", "cuda", "npu"] = option("auto", "What to run on.")
    distributed_timeout_minutes: int = option(45, "How long a collective may take.", unit="minutes", minimum=1)

    def processes(self) -> int:
        """How many processes to start where no launcher did."""
        return self.nproc_per_node or self.model_ranks * self.expert_model_parallel_size

    @property
    def _ulysses(self) -> int:
        """How many ranks exchange heads for tokens."""
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
            raise ModelLinkError(f"a ring of {cp} ranks cannot be made of sets of {degree} ranks",
                                 where="--ulysses-degree-in-cp, --context-parallel-size",
                                 fix="the degree divides the context parallel size and is smaller")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ModelLinkError("parameters are gathered ahead only for the distributed optimizer with overlapped gradients",
                                 where="--overlap-param-gather",
                                 fix="add --use-distributed-optimizer and --overlap-grad-reduce")
        if degree is not None and not hybrid:
            raise ModelLinkError(f"a degree is for hybrid_cp_algo, the algorithm is {self.context_parallel_algo}",
                                 where="--ulysses-degree-in-cp, --context-parallel-algo")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ModelLinkError("sequence parallelism cuts over the tensor-parallel ranks, and there is one",
                                 where="--sequence-parallel", fix="leave it out, or use --tensor-model-parallel-size 2 or more")
        if self.use_mc2 and self.tensor_model_parallel_size == 1:
            raise ModelLinkError("products are joined with what tensor-parallel ranks exchange, and there is one",
                                 where="--use-mc2", fix="leave it out, or use --tensor-model-parallel-size 2 or more")
