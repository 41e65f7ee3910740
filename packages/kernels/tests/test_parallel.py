# SPDX-License-Identifier: Apache-2.0
"""How a model is split: every layer and row is on exactly one rank, in order; errors name what works."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import (
    ParallelLayout,
    Split,
    check_tensor_parallel,
    padded_vocab_size,
    query_key_value_rows,
    shard_ranges,
)

small = st.integers(1, 6)


@given(pp=small, vpp=small, per_chunk=small)
def test_chunks_hold_every_layer_once(pp: int, vpp: int, per_chunk: int) -> None:
    layout, layers = ParallelLayout(pp=pp, vpp=vpp), pp * vpp * per_chunk
    in_order = [number for chunk in range(vpp) for stage in range(pp) for number in layout.layers(layers, stage, chunk)]
    assert in_order == list(range(layers))


@given(st.lists(small, min_size=1, max_size=6))
def test_a_layer_list_deals_layers_in_order(counts: list[int]) -> None:
    layout = ParallelLayout(pp=len(counts), num_layer_list=tuple(counts))
    stages = [layout.layers(sum(counts), stage) for stage in range(len(counts))]
    assert [len(stage) for stage in stages] == counts
    assert [number for stage in stages for number in stage] == list(range(sum(counts)))


def test_chunks_alternate_over_stages_as_in_megatron() -> None:
    layout = ParallelLayout(pp=2, vpp=2)
    assert [list(layout.layers(8, stage, chunk)) for stage, chunk in [(0, 0), (1, 0), (0, 1), (1, 1)]] == [
        [0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(("layout", "layers", "message"), [
    (ParallelLayout(pp=4), 30, "use 1, 2, 3, 5, 6, 10, 15 or 30 stages"),
    (ParallelLayout(pp=2, vpp=4), 12, "of 4 chunks"),
    (ParallelLayout(pp=2, num_layer_list=(1, 2)), 4, "2 stages with 3 layers; there are 2 stages and 4 layers"),
    (ParallelLayout(pp=3, num_layer_list=(2, 2)), 4, "there are 3 stages"),
    (ParallelLayout(pp=2, num_layer_list=(4, 0)), 4, "the layer list 4,0"),
    (ParallelLayout(pp=2, vpp=2, num_layer_list=(2, 2)), 4, "exclude each other"),
])
def test_layers_that_cannot_be_dealt(layout: ParallelLayout, layers: int, message: str) -> None:
    with pytest.raises(ModelLinkError) as caught:
        layout.layers(layers, 0)
    assert message in str(caught.value)


@given(split=st.sampled_from(["column", "row", "vocab", "gated"]), tp=small, count=small)
def test_ranks_hold_every_row_once(split: Split, tp: int, count: int) -> None:
    size = tp * count * (2 if split == "gated" else 1)
    ranks = [shard_ranges(split, size, tp, rank) for rank in range(tp)]
    assert sorted(row for pieces in ranks for piece in pieces for row in piece) == list(range(size))
    assert len({sum(map(len, pieces)) for pieces in ranks}) == 1


def test_a_gated_matrix_is_cut_in_each_half() -> None:
    assert shard_ranges("gated", 12, 3, 1) == [range(2, 4), range(8, 10)]
    assert shard_ranges("replicated", 5, 3, 2) == [range(5)]


@pytest.mark.parametrize(("split", "size"), [("column", 9), ("gated", 12), ("gated", 7)])
def test_rows_that_cannot_be_dealt(split: Split, size: int) -> None:
    with pytest.raises(ModelLinkError, match="cannot be split evenly across 4"):
        shard_ranges(split, size, 4, 0)


@given(groups=small, per_group=small, head_dim=st.integers(1, 9))
def test_fused_rows_are_a_permutation_of_three_projections(groups: int, per_group: int, head_dim: int) -> None:
    rows = query_key_value_rows(groups * per_group, groups, head_dim)
    for name, size in [("q", groups * per_group * head_dim), ("k", groups * head_dim), ("v", groups * head_dim)]:
        assert [row for kind, piece in rows if kind == name for row in piece] == list(range(size))
    assert [kind for kind, _ in rows] == list("qkv") * groups


@given(groups=small, per_group=small, head_dim=st.integers(1, 5), tp=small)
def test_a_plain_cut_of_the_fused_rows_keeps_groups_whole(groups: int, per_group: int, head_dim: int, tp: int) -> None:
    """Rank t has the rows that its own groups alone would have."""
    groups *= tp
    order = [(kind, row) for kind, piece in query_key_value_rows(groups * per_group, groups, head_dim) for row in piece]
    own = groups // tp
    for rank in range(tp):
        (rows,) = shard_ranges("column", len(order), tp, rank)
        shift = {"q": rank * own * per_group * head_dim, "k": rank * own * head_dim, "v": rank * own * head_dim}
        alone = [(kind, row + shift[kind]) for kind, piece in query_key_value_rows(own * per_group, own, head_dim)
                 for row in piece]
        assert order[rows.start:rows.stop] == alone


@given(vocab=st.integers(1, 1000), tp=small, divisible_by=st.integers(1, 130))
def test_the_vocabulary_is_padded_as_little_as_possible(vocab: int, tp: int, divisible_by: int) -> None:
    padded = padded_vocab_size(vocab, tp, divisible_by)
    assert padded % (tp * divisible_by) == 0 and vocab <= padded < vocab + tp * divisible_by


def test_tensor_parallel_sizes_that_work_are_named() -> None:
    check_tensor_parallel(3, num_attention_heads=9, num_query_groups=3, ffn_hidden_sizes=[1536])
    with pytest.raises(ModelLinkError) as caught:
        check_tensor_parallel(2, num_attention_heads=9, num_query_groups=3, ffn_hidden_sizes=[1536])
    assert "2 does not divide the 3 query groups (of 9 attention heads)" in str(caught.value)
    assert "use 1 or 3" in str(caught.value)
    with pytest.raises(ModelLinkError, match="feed-forward hidden size 6"):
        check_tensor_parallel(4, num_attention_heads=4, num_query_groups=4, ffn_hidden_sizes=[6])


def test_experts_are_dealt_evenly() -> None:
    assert list(ParallelLayout(ep=2).experts(8, 1)) == [4, 5, 6, 7]
    with pytest.raises(ModelLinkError, match="8 experts cannot be split evenly across 3"):
        ParallelLayout(ep=3).experts(8, 0)


def test_layouts_describe_themselves() -> None:
    assert str(ParallelLayout()) == "one rank" and str(ParallelLayout(tp=3, pp=2)) == "TP 3 x PP 2"
    assert ParallelLayout(tp=3, pp=2, dp=2).world_size == 12
