# SPDX-License-Identifier: Apache-2.0
"""Any model through any two layouts and formats: there and back keeps every bit, and a detour changes no byte.

Models are drawn field by field, not by family, so they also have combinations that no family has. All numbers of a model are
different, so that a misplaced row is detected.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modellink.ckpt_convert.format import WriteRequest
from modellink.ckpt_convert.formats import format_of
from modellink.ckpt_convert.formats.megatron import plan_megatron
from modellink.ckpt_convert.megatron import distributed, model
from modellink.ckpt_convert.megatron.rank_state import Style
from modellink.ckpt_convert.plan import ConversionPlan
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage import writing
from modellink.ckpt_convert.storage.tensors import Assembled, Part, Stored
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout, divisors


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Draw a small model: dense or with experts, grouped or latent attention, biases, norms, tied or not."""
    groups, size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4, 6]))
    latent, mixture = draw(st.booleans()), draw(st.booleans())
    values: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 6)), "hidden_size": draw(st.sampled_from([5, 8, 10])), "num_query_groups": groups,
        "num_attention_heads": groups * (1 if latent else draw(st.integers(1, 3))), "kv_channels": size,
        "ffn_hidden_size": draw(st.sampled_from([4, 8, 12])), "vocab_size": draw(st.integers(3, 30)),
        "normalization": draw(st.sampled_from(["RMSNorm", "LayerNorm"])), "gated_linear_unit": draw(st.booleans()),
        "add_qkv_bias": draw(st.booleans()), "add_dense_bias": draw(st.booleans()), "add_mlp_bias": draw(st.booleans()),
        "post_norm": draw(st.booleans()), "embed_layernorm": draw(st.booleans()),
        "untie_embeddings_and_output_weights": draw(st.booleans()), "max_position_embeddings": 7,
        "position_embedding_type": draw(st.sampled_from(["rope", "learned_absolute"]))}
    if latent:
        values |= {"multi_head_latent_attention": True, "q_lora_rank": draw(st.sampled_from([None, 3])), "kv_lora_rank": 5,
                   "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4, "add_qkv_bias": False}
    if mixture:
        shared = draw(st.sampled_from([None, 8]))
        values |= {"num_experts": draw(st.sampled_from([2, 4])), "moe_intermediate_size": draw(st.sampled_from([None, 4, 8])),
                   "first_k_dense_replace": draw(st.integers(0, 2)), "moe_layer_freq": draw(st.integers(1, 2)),
                   "moe_shared_expert_intermediate_size": shared, "shared_expert_gate": bool(shared) and draw(st.booleans())}
    return ModelSpec(**values)


@st.composite
def layouts(draw: st.DrawFn, spec: ModelSpec) -> ParallelLayout:
    """Draw a layout that divides the model."""
    tp = draw(st.sampled_from([size for size in (1, 2, 4) if spec.groups % size == 0]))
    ep = draw(st.sampled_from(divisors(spec.num_experts))) if spec.num_experts else 1
    if draw(st.booleans()):  # uneven stages
        pp = draw(st.integers(1, spec.num_layers))
        cuts = sorted(draw(st.permutations(range(1, spec.num_layers)))[:pp - 1])
        stages = tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, spec.num_layers], strict=True))
        return ParallelLayout(tp=tp, pp=pp, ep=ep, num_layer_list=stages if len(set(stages)) > 1 else None)
    pp = draw(st.sampled_from(divisors(spec.num_layers)))
    vpp = draw(st.sampled_from(divisors(spec.num_layers // pp))) if pp > 1 else 1
    return ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep)


@st.composite
def forms(draw: st.DrawFn, spec: ModelSpec) -> Callable[[Checkpoint], ConversionPlan]:
    """Draw a way to write the model: a format, a layout, a dialect."""
    if draw(st.integers(0, 4)) == 0:
        return lambda source: format_of("torch-dist").plan(source, WriteRequest(shard_bytes=2000))
    layout = draw(layouts(spec))
    style = Style(draw(st.booleans()) and legacy(spec), draw(st.sampled_from(["megatron-core", "modellink-1.0"])),
                  draw(st.booleans()) and grouped(spec), draw(st.sampled_from([1, 4])))
    return lambda source: plan_megatron(source, layout, style)


def legacy(spec: ModelSpec) -> bool:
    return not (spec.num_experts or spec.multi_head_latent_attention or spec.post_norm)


def grouped(spec: ModelSpec) -> bool:
    return bool(spec.num_experts) and not spec.add_mlp_bias


def numbered(spec: ModelSpec, folder: Path) -> Checkpoint:
    """Write a checkpoint as one raw file in which every number is its own position."""
    tensors, at = {}, 0
    for name, weight in weights(spec).items():
        stored = Stored(folder / "raw", at * 4, "float32", weight.shape)
        part = Part(stored, range(weight.shape[0]), range(stored.columns), (0, 0))
        tensors[name] = Assembled(name, weight.shape, (part,))
        at += prod(weight.shape)
    (folder / "raw").write_bytes(torch.arange(at, dtype=torch.float32).numpy().tobytes())
    return Checkpoint("raw", folder, spec, "llama", folder, tensors)


def written(plan: ConversionPlan, folder: Path) -> tuple[Checkpoint, dict[str, bytes]]:
    """Write a plan; return (the checkpoint read back, the bytes of its files)."""
    with ThreadPoolExecutor(2) as pool:
        for file in plan.files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as handle:
                writing.write(handle.fileno(), file.layout, pool, lambda count: None, path)
    root, spec = folder / "iter_0000001", plan.source.spec
    if plan.to == "torch-dist":
        tensors, layout = distributed.read(root, spec), ParallelLayout()
    else:
        found = model.read(root, spec)
        tensors, layout = found.tensors, found.layout
        assert layout == plan.layout
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Checkpoint(plan.to, folder, spec, "llama", folder, tensors, layout, 1), content


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_there_and_back_and_detours(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    spec = data.draw(specs())
    first, second = data.draw(forms(spec)), data.draw(forms(spec))
    folder = tmp_path_factory.mktemp("any")
    source = numbered(spec, folder)
    one, _ = written(first(source), folder / "a")
    detour, by_detour = written(second(one), folder / "a-b")
    _, straight = written(second(source), folder / "b")
    assert by_detour == straight
    for name, weight in weights(spec).items():
        rows = [range(weight.shape[0])]
        assert torch.equal(source.read(name, rows, 0), detour.read(name, rows, 0)), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_rectangle_of_any_tensor(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reading ranges along a dimension and part of the other equals indexing the full tensor."""
    spec = data.draw(specs())
    folder = tmp_path_factory.mktemp("any")
    checkpoint, _ = written(data.draw(forms(spec))(numbered(spec, folder)), folder / "a")
    name = data.draw(st.sampled_from([name for name, weight in weights(spec).items() if len(weight.shape) == 2]))
    whole = checkpoint.read(name, [range(weights(spec)[name].shape[0])], 0)
    dim = data.draw(st.integers(0, 1))

    def a_range(size: int) -> range:
        start = data.draw(st.integers(0, size - 1))
        return range(start, data.draw(st.integers(start + 1, size)))

    pieces = [a_range(whole.shape[dim]) for _ in range(data.draw(st.integers(1, 3)))]
    across = a_range(whole.shape[1 - dim])
    rows = torch.cat([whole.narrow(dim, piece.start, len(piece)) for piece in pieces], dim)
    expected = rows.narrow(1 - dim, across.start, len(across))
    assert torch.equal(checkpoint.read(name, pieces, dim, across), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_layout_that_does_not_divide_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    spec = data.draw(specs())
    layout = ParallelLayout(tp=data.draw(st.sampled_from([1, 2, 3])), pp=data.draw(st.integers(1, 4)),
                            ep=data.draw(st.integers(1, 3)))
    divides = (spec.groups % layout.tp == 0 and spec.num_layers % layout.pp == 0 and all(
        width % layout.tp == 0 for width in (spec.ffn, spec.expert_ffn)) and (
        (spec.num_experts or 0) % layout.ep == 0 if spec.num_experts else layout.ep == 1))
    source = numbered(spec, tmp_path_factory.mktemp("any"))
    if divides:
        plan_megatron(source, layout, Style())
    else:
        with pytest.raises(ModelLinkError):
            plan_megatron(source, layout, Style())
