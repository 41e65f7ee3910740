# SPDX-License-Identifier: Apache-2.0
"""Memory of a paged cache: the keys and values of the tokens a model has seen, allocated once.

Latent attention (DeepSeek-V2) caches its compressed form: one key for all heads, whose first part is the
value. Not here: which page holds what (pages.py), and how a pass reads and writes the pages (attention.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.infer.pages import PAGE_SIZE, CachedSequence, PagePool, PageTables


def rotary_depends_on_length(spec: ModelSpec, length: int) -> bool:
    """Return whether each further token of a sequence of this length changes the rotary angles of all tokens.

    This is dynamic rotary scaling beyond the original length. Cached keys are then of no use, neither to the
    next pass nor to another sequence.
    """
    return spec.rope_scaling_type == "dynamic" and length > (spec.original_max_position_embeddings or 0)


def bytes_per_token(spec: ModelSpec, layers: int, tp: int, dtype: torch.dtype) -> int:
    """Return the bytes that one token takes in the cache of `layers` layers on one rank."""
    return layers * dtype.itemsize * sum(groups * dim for groups, dim in _shapes(spec, tp) if dim)


def cache_bytes(spec: ModelSpec, layers: range, *, tokens: int, max_sequences: int, max_chunk: int, tp: int,
                dtype: torch.dtype) -> int:
    """Return the bytes that a cache takes on one rank; see `PagedCache` for the arguments."""
    pages = sum(_pages(spec.layer(layer).window, tokens, max_sequences, max_chunk) for layer in layers)
    return pages * PAGE_SIZE * bytes_per_token(spec, 1, tp, dtype)


def _pages(window: int | None, tokens: int, max_sequences: int, max_chunk: int) -> int:
    """Return the number of pages of a pool."""
    pages = -(-tokens // PAGE_SIZE)
    return pages if window is None else min(pages, max_sequences * _window_pages(window, max_chunk))


def _window_pages(window: int, max_chunk: int) -> int:
    """Return the most pages that a sequence of any length holds at a time in layers with this window."""
    return -(-(window + max_chunk + 2 * PAGE_SIZE) // PAGE_SIZE)


def _shapes(spec: ModelSpec, tp: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (groups, size) of a cached key and of a cached value on one rank."""
    if spec.multi_head_latent_attention:
        return (1, (spec.kv_lora_rank or 0) + spec.rotary_dim), (1, 0)
    return (spec.groups // tp, spec.head_dim), (spec.groups // tp, spec.value_dim)


class PagedCache:
    """Keys and values of the layers on this rank.

    Args:
        layers: global numbers (from 0) of the layers on this rank.
        tokens: capacity in tokens over all sequences.
        max_sequences: the most sequences at a time.
        max_chunk: the most tokens that a pass computes of one sequence. Together with `max_sequences` it
            bounds the pages that layers with a window need.

    Attributes:
        pools: one for each window that occurs in the model.
        keys, values: memory by layer number (from 1), each [slots, groups, dim]. The last slot belongs to no
            page.
        latent: size of the value within the key in latent attention, else None.
    """

    def __init__(self, spec: ModelSpec, layers: range, *, tokens: int, max_sequences: int, max_chunk: int,
                 tp: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.device, self.max_chunk = spec, device, max_chunk
        windows = sorted({spec.layer(layer).window for layer in range(spec.num_layers)},
                         key=lambda window: window or 0)
        self.pools = [PagePool(_pages(window, tokens, max_sequences, max_chunk), window)
                      for window in windows]
        self.tables = PageTables(self.pools)
        self.pool_of_layer = {layer + 1: windows.index(spec.layer(layer).window) for layer in layers}
        self.latent = spec.kv_lora_rank if spec.multi_head_latent_attention else None
        key, value = _shapes(spec, tp)
        self.keys, self.values = self._allocate(key, dtype), self._allocate(value, dtype)

    def _allocate(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[int, Tensor]:
        return {layer: torch.empty(self.pools[pool].pages * PAGE_SIZE + 1, *shape, dtype=dtype,
                                   device=self.device)
                for layer, pool in self.pool_of_layer.items()}

    def max_pages(self, pool: PagePool, length: int) -> int:
        """Return the most pages of a pool that a sequence of `length` tokens holds at a time."""
        pages = -(-length // PAGE_SIZE)
        return pages if pool.window is None else min(pages, _window_pages(pool.window, self.max_chunk))

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence that fits, in tokens."""
        limits = [pool.pages * PAGE_SIZE for pool in self.pools
                  if pool.window is None or pool.pages < _window_pages(pool.window, self.max_chunk)]
        return min(limits, default=1 << 62)

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes for side in (self.keys, self.values) for memory in side.values())

    def fork(self, sequence: CachedSequence, tokens: list[int]) -> CachedSequence:
        """Return a copy of a sequence that continues with `tokens`: full pages are shared, the last page is
        copied.

        Every pool must have a free page.
        """
        tables = []
        full = sequence.computed // PAGE_SIZE
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            copy = [pool.share(page) for page in table[:full]]
            for page in table[full:]:
                copy.append(pool.allocate())
                self._copy_page(pool, page, copy[-1])
            tables.append(copy)
        return CachedSequence(tokens, sequence.computed, tables, list(sequence.digests[:full]))

    def _copy_page(self, pool: PagePool, source: int, target: int) -> None:
        old, new = (slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in (source, target))
        for layer, number in self.pool_of_layer.items():
            if self.pools[number] is pool:
                for side in (self.keys, self.values):
                    side[layer][new] = side[layer][old]
