# SPDX-License-Identifier: Apache-2.0
"""Every use of every op on the simulated NPU: the kernels it comes to, and its values and gradients against the plain form."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import beside

from modellink.kernels.ops.cases import alone
from modellink.kernels.ops.check import TOLERANCE

LAYERS = beside(__file__, "layers")
ALONE = [case.name for case in alone(torch.device("cpu"), torch.float32)]
JOINED = [f"{op}{use}" for op in ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
          for use in ("", ": inner size below 256")]


@pytest.mark.parametrize("dtype", LAYERS.TYPES)
@pytest.mark.parametrize("name", [*ALONE, *JOINED])
def test_torch_npu_brings_our_call_to_the_kernel(layers, name, dtype):
    found = layers[dtype][name]
    assert tuple(found["kernels"]) == LAYERS.expected(name, dtype), found["difference"]


@pytest.mark.parametrize("dtype", LAYERS.TYPES)
@pytest.mark.parametrize("name", [*ALONE, *JOINED])
def test_values_and_gradients_are_those_of_the_plain_form(layers, name, dtype):
    difference = layers[dtype][name]["difference"]
    assert isinstance(difference, float) and not math.isnan(difference), difference
    assert difference <= TOLERANCE[getattr(torch, dtype)]


@pytest.mark.parametrize("dtype", LAYERS.TYPES)
@pytest.mark.parametrize("name", ALONE)
def test_shapes_and_types_without_memory(layers, name, dtype):
    assert layers[dtype][name]["fake"] == "as plain"


def test_the_kernels_of_half_precision_are_really_called(layers):
    """None of the expectations above is empty by mistake."""
    called = {call[0] for of_case in layers["bfloat16"].values() for call in of_case["calls"]}
    assert called == set(beside(__file__, "schemas").OPERATORS)
