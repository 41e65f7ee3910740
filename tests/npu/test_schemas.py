# SPDX-License-Identifier: Apache-2.0
"""Every call we make fits the operator's schema in every supported version of torch_npu that has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import beside

SCHEMAS, LAYERS = beside(__file__, "schemas"), beside(__file__, "layers")
KNOWN = SCHEMAS.known()
MISSING = {version: {"npu_ring_attention_update"} for version in ("2.6.0.post5", "2.8.0.post5", "2.9.1")}
"""What versions do not have, and is composed of torch's operators there."""


@pytest.mark.parametrize("version", SCHEMAS.VERSIONS)
def test_our_calls_fit(layers, version):
    checked = set()
    for found in layers.values():
        for case, of_case in found.items():
            for name, positional, named in of_case["calls"]:
                if schema := KNOWN[version].get(name):
                    assert SCHEMAS.problem(schema, positional, named) is None, f"{case}: {name} of {version}"
                    checked.add(name)
    assert checked == set(SCHEMAS.OPERATORS) - MISSING.get(version, set())


def test_a_call_that_does_not_fit_is_found():
    schema = KNOWN[SCHEMAS.VERSIONS[-1]]["npu_rms_norm"]
    assert SCHEMAS.problem(schema, ["Tensor", "Tensor", "float"], {}) is None
    assert SCHEMAS.problem(schema, ["Tensor", "Tensor"], {"eps": "float"}) == "no argument eps"
    assert SCHEMAS.problem(schema, ["Tensor"], {}) == "gamma missing"
    assert SCHEMAS.problem(schema, ["Tensor", "int"], {}) == "gamma is a Tensor, given int"
    assert SCHEMAS.problem(schema, ["Tensor"] * 4, {}) == "4 arguments by position, it has 3"
    packed = KNOWN[SCHEMAS.VERSIONS[-1]]["npu_fusion_attention"]
    heads = ["Tensor", "Tensor", "Tensor", "int", "str"]
    assert SCHEMAS.problem(packed, heads, {"pre_tockens": "int", "atten_mask": "None"}) is None
    assert SCHEMAS.problem(packed, heads, {"actual_seq_qlen": "Tensor"}) == "actual_seq_qlen is a int[]?, given Tensor"


@pytest.mark.stress
def test_the_file_is_what_the_wheels_hold():
    done = subprocess.run([sys.executable, str(Path(SCHEMAS.__file__)), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
