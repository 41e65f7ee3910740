"""Which ops may take the fused form of their device (kernels.ops); a table is in the README of modellink-kernels.

Not here: forms that are asked for because they change what is sent or kept (--use-mc2, --moe-grouped-gemm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modellink.kernels.options import option

OPS = {"use_flash_attn": ("attention", "attention_block"), "use_fused_rmsnorm": ("rms_norm",), "use_fused_swiglu": ("swiglu",),
       "use_fused_rotary_pos_emb": ("rotary",), "use_fused_ring_attention_update": ("ring_update",)}
"""Field -> the ops it is about."""


@dataclass(frozen=True)
class FusedConfig:
    section: ClassVar[str] = "fused"

    use_flash_attn: bool = option(
        True, "Attention in the fused form of the device; without, in plain PyTorch, which holds the scores of whole sequences.")
    use_fused_rmsnorm: bool = option(True, "The root-mean-square norm in the fused form of the device; without, plain PyTorch.")
    use_fused_swiglu: bool = option(True, "The SiLU-gated activation likewise.")
    use_fused_rotary_pos_emb: bool = option(True, "The rotation of queries and keys likewise.")
    use_fused_ring_attention_update: bool = option(
        True, "megatron_cp_algo, hybrid_cp_algo: the joining of attention over two sets of keys likewise.")

    @property
    def plain_ops(self) -> list[str]:
        """The ops that take their plain form on every device."""
        return [op for field, ops in OPS.items() if not getattr(self, field) for op in ops]
