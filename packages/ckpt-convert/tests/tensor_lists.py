# SPDX-License-Identifier: Apache-2.0
"""Lists of tensor names and shapes, layers and experts folded into ranges; which records need additional keys or are refused.

A line is `model.layers.{0-31}.mlp.experts.{0-7}.w1.weight [14336, 4096]`: one tensor for every number in each range.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

PUBLIC = Path(__file__).parent / "public"
Shapes = dict[str, tuple[int, ...]]
COMPLETED = {
    "minicpm-moe-8x2b": {"architectures": ["MiniCPMForCausalLM"]},  # the record has neither architectures nor model_type
    "glm-4-9b": {"kv_channels": 128}}  # not recorded; as in its chat model
"""Keys added to unverified records."""
REFUSED = {"grok-1-keyfan": "grok"}
"""Records of unsupported model types -> their model type: no list of tensor names was found for this other port of Grok-1."""


def fold(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the lines of a list, in the order of their first tensors."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        groups.setdefault((pattern, tuple(shape)), []).append(tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name))))
    lines = []
    for (pattern, shape), numbers in groups.items():
        ranges = [range(min(axis), max(axis) + 1) for axis in zip(*numbers, strict=True)]
        assert sorted(numbers) == sorted(product(*ranges)), f"{pattern} has gaps"
        lines.append(pattern.format(*(f"{{{axis.start}-{axis[-1]}}}" for axis in ranges)) + f" {list(shape)}")
    return lines


def unfold(lines: Iterable[str]) -> Shapes:
    """Return name -> shape of every tensor of a list."""
    shapes = {}
    for line in lines:
        name, _, shape = line.partition(" ")
        ranges = [range(int(first), int(last) + 1) for first, last in re.findall(r"\{(\d+)-(\d+)\}", name)]
        pattern = re.sub(r"\{\d+-\d+\}", "{}", name)
        for numbers in product(*ranges):
            shapes[pattern.format(*numbers)] = tuple(map(int, re.findall(r"\d+", shape)))
    return shapes
