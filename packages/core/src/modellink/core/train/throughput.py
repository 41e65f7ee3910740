# SPDX-License-Identifier: Apache-2.0
"""Tokens and floating-point operations per second, for the log line (`--log-throughput`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import EXPERTS, weights
from modellink.core.run import Run
from modellink.core.train.history import Step


@dataclass(frozen=True)
class Throughput:
    """How many tokens and floating-point operations one sample costs one rank.

    Attributes:
        peak: floating-point operations per second of the device; None if unknown.
        ranks: number of ranks.
    """

    tokens: float
    flops: float
    peak: float | None
    ranks: int

    def rates(self, steps: Sequence[Step]) -> dict[str, float]:
        """Values for TensorBoard: TFLOP/s of a rank under Megatron's name, and tokens per second of all ranks."""
        rate = _samples(steps) / sum(step.seconds for step in steps)
        return {"throughput": rate * self.flops / 1e12, "tokens-per-second": rate * self.tokens * self.ranks}

    def report(self, steps: Sequence[Step], seconds: float) -> list[str]:
        """Parts of the log line for these iterations, which took `seconds` with everything around them."""
        rate = _samples(steps) / seconds
        parts = [f"throughput per GPU (TFLOP/s/GPU): {rate * self.flops / 1e12:.1f}",
                 f"tokens per second per GPU: {rate * self.tokens:.1f}"]
        if self.peak is not None:
            parts.append(f"MFU: {rate * self.flops / self.peak:.1%} of {self.peak / 1e12:g} TFLOP/s")
        return parts


def _samples(steps: Sequence[Step]) -> int:
    return sum(step.global_batch_size for step in steps)


def throughput(run: Run) -> Throughput:
    """What a sample of the run costs; padding counts as tokens.

    Matrix products count 2 operations per weight and token forward and 4 backward (2 for frozen weights); causal attention
    counts half of the full square (appendix of Narayanan et al. 2021, arXiv:2104.04473).
    """
    spec, seq = run.spec, run.data.seq_length
    attention = spec.num_layers * seq * spec.num_attention_heads * (spec.head_dim + spec.value_dim) / 2
    per_weight = 4.0 if run.lora.on else 6.0
    tokens = seq / run.layout.world_size
    flops = (6.0 * attention + per_weight * _active_weights(spec)) * tokens
    peak = run.logging.peak_tflops
    return Throughput(tokens, flops, None if peak is None else peak * 1e12, run.layout.world_size)


def _active_weights(spec: ModelSpec) -> float:
    """Entries of all matrices that a token is multiplied with, the output layer included."""
    count = float(spec.hidden_size * spec.vocab_size)
    for name, weight in weights(spec).items():
        if name.startswith("decoder.") and len(weight.shape) == 2:
            share = spec.moe_router_topk / (spec.num_experts or 1) if EXPERTS in name else 1
            count += math.prod(weight.shape) * share
    return count
