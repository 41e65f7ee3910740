# SPDX-License-Identifier: Apache-2.0
"""Which ops use the fused kernel of the device (kernels.ops); the README of modellink-kernels has a table.

Not here: options that also change communication or memory (--use-mc2, --moe-grouped-gemm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modellink.kernels.options import option

OPS = {"use_flash_attn": ("attention", "attention_block"), "use_fused_rmsnorm": ("rms_norm",), "use_fused_swiglu": ("swiglu",),
       "use_fused_rotary_pos_emb": ("rotary",), "use_fused_ring_attention_update": ("ring_update",)}
"""Field -> the ops it controls."""


@dataclass(frozen=True)
class FusedConfig:
    heading: ClassVar[str] = "Fused operators"

    use_flash_attn: bool = option(
        True, "Use the device's fused attention; otherwise plain PyTorch, which stores the scores of full sequences.")
    use_fused_rmsnorm: bool = option(True, "Use the device's fused RMSNorm; otherwise plain PyTorch.")
    use_fused_swiglu: bool = option(True, "Use the device's fused SwiGLU; otherwise plain PyTorch.")
    use_fused_rotary_pos_emb: bool = option(True, "Use the device's fused rotary embedding; otherwise plain PyTorch.")
    use_fused_ring_attention_update: bool = option(
        True, "Ring attention: use the device's fused update of partial results; otherwise plain PyTorch.")

    @property
    def plain_ops(self) -> list[str]:
        """The ops that use plain PyTorch on every device."""
        return [op for field, ops in OPS.items() if not getattr(self, field) for op in ops]
