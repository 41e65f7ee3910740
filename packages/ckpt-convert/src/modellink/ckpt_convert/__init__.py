# SPDX-License-Identifier: Apache-2.0
"""Checkpoint conversion between Hugging Face and Megatron layouts, and the one description of a model
(ModelSpec)."""

__version__ = "0.1.0"

from modellink.ckpt_convert.convert import Converted, convert
from modellink.ckpt_convert.open import open_checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.streams import Shard, iter_hf_tensors, iter_megatron_shards

__all__ = ["Converted", "ModelSpec", "Shard", "convert", "iter_hf_tensors", "iter_megatron_shards",
           "open_checkpoint"]
