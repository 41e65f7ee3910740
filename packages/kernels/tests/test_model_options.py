# SPDX-License-Identifier: Apache-2.0
"""The options that several commands share: layouts from sizes, with virtual stages, and errors that name what works."""

from __future__ import annotations

import pytest

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import LayoutOptions, RunModelOptions, VirtualLayoutOptions
from modellink.kernels.options import Layer, fields_of, resolve
from modellink.kernels.parallel import ParallelLayout


def test_remaining_ranks_are_data_parallel() -> None:
    options = LayoutOptions(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, expert_model_parallel_size=2)
    assert options.layout(world_size=24) == ParallelLayout(tp=2, pp=3, ep=2, dp=4)
    assert options.layout() == ParallelLayout(tp=2, pp=3, ep=2, dp=2)
    assert options.model_ranks == 6


@pytest.mark.parametrize(("world_size", "message", "option"), [
    (7, "7 processes are not a multiple of 6 (TP 2 x PP 3)", "nproc_per_node"),
    (6, "expert parallel size 2 does not divide the 1 data-parallel ranks", "expert_model_parallel_size")])
def test_sizes_that_do_not_divide_the_processes(world_size: int, message: str, option: str) -> None:
    options = LayoutOptions(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, expert_model_parallel_size=2)
    with pytest.raises(ModelLinkError) as caught:
        options.layout(world_size=world_size)
    assert message in str(caught.value) and caught.value.option == option


def test_virtual_stages() -> None:
    options = VirtualLayoutOptions(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert options.layout(12) == ParallelLayout(pp=2, vpp=3)
    assert options.layout() == ParallelLayout(pp=2)
    with pytest.raises(ModelLinkError, match="10 layers cannot be split into chunks of 2 layers for 2 stages"):
        options.layout(10)


def test_a_layer_list() -> None:
    values = {"num_layer_list": "3,5", "pipeline_model_parallel_size": 2}
    options = resolve([RunModelOptions], Layer("x", values))[RunModelOptions]
    assert options.layout(8).num_layer_list == (3, 5)


def test_own_options_come_before_inherited_ones() -> None:
    names = [field.name for field in fields_of(RunModelOptions)]
    assert names[:3] == ["prompt_type", "device", "dtype"] and "tensor_model_parallel_size" in names
