# SPDX-License-Identifier: Apache-2.0
"""Every op's form on this device, with gradients, against the plain form and an independent formula."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from modellink.kernels import ops
from modellink.kernels.ops import dispatch
from modellink.kernels.ops.adamw import Settings
from modellink.kernels.ops.attention import Documents, Variant, alibi_slopes, scores_of
from modellink.kernels.ops.cases import alone
from modellink.kernels.ops.check import TOLERANCE, difference
from modellink.kernels.ops.rotary import Scaling, inverse_frequencies, yarn_scale

rms_norm, swiglu, rotary, linear = (
    importlib.import_module(f"modellink.kernels.ops.{name}") for name in ("rms_norm", "swiglu", "rotary", "linear"))
CASES = {dtype: {case.name: case for case in alone(torch.device("cpu"), dtype)} for dtype in TOLERANCE}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES[torch.float32])
def test_the_form_of_this_device_means_the_plain_form(name, dtype):
    assert difference(CASES[dtype][name]) <= TOLERANCE[dtype]


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=dtype)


X, WEIGHTS = torch.zeros(6, 4), [torch.zeros(3, 4)] * 2
STARTS = torch.zeros(2, 7, dtype=torch.long)
REFUSED = {
    "rms_norm: weight": lambda: ops.rms_norm(X, torch.ones(3), 1e-5), "swiglu: odd": lambda: ops.swiglu(torch.zeros(2, 7)),
    "cross_entropy: labels": lambda: ops.cross_entropy(X, torch.zeros(5, dtype=torch.long)),
    "rotary: positions": lambda: ops.rotary(heads(7, 2, 6, 8), heads(5, 1, 1, 8), heads(5, 1, 1, 8)),
    "rotary: cos and sin": lambda: ops.rotary(heads(7, 2, 6, 8), heads(7, 1, 1, 8), heads(7, 2, 1, 8)),
    "rotary: too wide": lambda: ops.rotary(heads(7, 2, 6, 8), heads(7, 1, 1, 10), heads(7, 1, 1, 10)),
    "rotary: odd": lambda: ops.rotary(heads(7, 2, 6, 8), heads(7, 1, 1, 7), heads(7, 1, 1, 7)),
    "rotary: types": lambda: ops.rotary(heads(7, 2, 6, 8, dtype=torch.bfloat16), heads(7, 1, 1, 8), heads(7, 1, 1, 8)),
    "attention: groups": lambda: ops.attention(heads(7, 2, 6, 8), heads(7, 2, 4, 8), heads(7, 2, 4, 8), Variant(1)),
    "attention: head size": lambda: ops.attention(heads(7, 2, 6, 8), heads(7, 2, 3, 6), heads(7, 2, 3, 8), Variant(1)),
    "attention: values": lambda: ops.attention(heads(7, 2, 6, 8), heads(7, 2, 3, 8), heads(6, 2, 3, 8), Variant(1)),
    "attention: batch": lambda: ops.attention(heads(7, 2, 6, 8), heads(7, 1, 3, 8), heads(7, 1, 3, 8), Variant(1)),
    "attention: types": lambda: ops.attention(heads(7, 2, 6, 8, dtype=torch.half), *[heads(7, 2, 3, 8)] * 2, Variant(1)),
    "attention: keys": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(9, 2, 3, 8)] * 2, Variant(1)),
    "attention: positions": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(9, 2, 3, 8)] * 2, Variant(1), STARTS[:, :6]),
    "attention: documents": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(7, 2, 3, 8)] * 2,
                                                  Variant(1, documents=Documents(STARTS[:, :6]))),
    "attention: documents over a cache": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(7, 2, 3, 8)] * 2,
                                                               Variant(1, documents=Documents(STARTS)), STARTS),
    "attention: slopes": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(7, 2, 3, 8)] * 2, Variant(1, slopes=torch.ones(3))),
    "attention: dropout": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(7, 2, 3, 8)] * 2, Variant(1, dropout=1.0)),
    "attention: window": lambda: ops.attention(heads(7, 2, 6, 8), *[heads(7, 2, 3, 8)] * 2, Variant(1, window=0)),
    "ring_update: sums": lambda: ops.ring_update(heads(7, 2, 6, 8), heads(7, 2, 3), heads(7, 2, 6, 8), heads(7, 2, 6)),
    "ring_update: types": lambda: ops.ring_update(heads(7, 2, 6, 8, dtype=torch.half), heads(7, 2, 6), heads(7, 2, 6, 8),
                                                  heads(7, 2, 6)),
    "linear: inner": lambda: ops.linear(X, torch.zeros(3, 5)), "linear: types": lambda: ops.linear(X.half(), torch.zeros(3, 4)),
    "grouped_matmul: rows": lambda: ops.grouped_matmul(X, WEIGHTS, [2, 3]),
    "grouped_matmul: groups": lambda: ops.grouped_matmul(X, WEIGHTS, [2, 2, 2]),
    "grouped_matmul: inner": lambda: ops.grouped_matmul(X[:, :3], WEIGHTS, [2, 4]),
    "grouped_matmul: unlike": lambda: ops.grouped_matmul(X, [WEIGHTS[0], torch.zeros(2, 4)], [2, 4]),
    "adamw: shapes": lambda: ops.adamw([X], [X.t()], [X], [X], SETTINGS),
    "adamw: counts": lambda: ops.adamw([X], [X], [], [X], SETTINGS),
    "all_gather_matmul: inner": lambda: ops.all_gather_matmul(X, torch.zeros(3, 5), Two()),
    "all_gather_matmul: 3 sizes": lambda: ops.all_gather_matmul(X[None], torch.zeros(3, 4), Two()),
    "matmul_reduce_scatter: rows": lambda: ops.matmul_reduce_scatter(X[:5], torch.zeros(3, 4), Two()),
    "matmul_reduce_scatter: types": lambda: ops.matmul_reduce_scatter(X.half(), torch.zeros(3, 4), Two()),
    "matmul_all_reduce: inner": lambda: ops.matmul_all_reduce(X, torch.zeros(3, 5), Two())}
SETTINGS = Settings(step=1, lr=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)


class Two:
    """A group of two ranks, with only what a check reads."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    with pytest.raises(ValueError, match=what.split(":")[0] if "counts" not in what else None):
        REFUSED[what]()


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("name", sorted(dispatch.OPS))
def test_a_device_has_its_fused_form_until_the_plain_one_is_asked_for(name, device_type):
    module = importlib.import_module(f"modellink.kernels.ops.{name}")

    def taken() -> object:
        return dispatch.form_of(name, device_type, module.FORMS, module.plain)
    usual = taken()
    assert usual is module.FORMS.get(device_type, module.plain)
    with ops.plain_forms(name):
        assert taken() is module.plain
        with ops.plain_forms(*dispatch.OPS - {name}):  # the inner ones are added to the outer
            assert taken() is module.plain
    assert taken() is usual
    with ops.plain_forms(*dispatch.OPS - {name}):
        assert taken() is usual


def test_the_plain_form_is_what_runs(qkv, monkeypatch):
    """For ops with a fused form on a CPU: the fused form is not called, and the result is the same."""
    attention = importlib.import_module("modellink.kernels.ops.attention")
    fused = ops.attention(*qkv, Variant(0.3))
    monkeypatch.setitem(attention.FORMS, "cpu", None)
    with pytest.raises(TypeError):
        ops.attention(*qkv, Variant(0.3))
    with ops.plain_forms("attention"):
        torch.testing.assert_close(ops.attention(*qkv, Variant(0.3)), fused, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="rmsnorm is not one of adamw, attention"), ops.plain_forms("rmsnorm"):
        pass


def with_gradients(form, tensors, **kwargs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = form(*leaves, **kwargs)
    weight = torch.linspace(-1, 1, result.numel()).view_as(result).to(result.dtype)
    return result.detach(), *torch.autograd.grad(result, leaves, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotary"])
def test_forms_in_place_take_views_and_leave_their_inputs(name, dtype):
    whole = torch.randn(5, 3, 4, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = whole.clone()
    angle = torch.rand(5, 1, 1, 6).repeat(1, 1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    form, plain = {
        "rms_norm": ((lambda x, w: ops.rms_norm(x[..., 8:], w, 1e-5)), lambda x, w: rms_norm.plain(x[..., 8:], w, 1e-5)),
        "swiglu": ((lambda x, w: ops.swiglu(x[..., 8:] * w)), lambda x, w: swiglu.plain(x[..., 8:] * w)),
        "rotary": ((lambda x, w: ops.rotary(x[..., 8:] * w, cos, sin)),
                   lambda x, w: torch.cat([rotary.plain((x[..., 8:] * w)[..., :12], cos, sin), (x[..., 8:] * w)[..., 12:]], -1)),
    }[name]
    weight = torch.rand(16).to(dtype)
    for found, expected in zip(with_gradients(form, [whole, weight]), with_gradients(plain, [whole, weight]), strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    assert torch.equal(whole, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [None, "WIDENED", pytest.param("ONE_DNN", marks=pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"))])
def test_a_linear_by_each_way_is_the_plain_one(monkeypatch, dtype, way):
    monkeypatch.setattr(linear, "_methods", lambda: {dtype: getattr(linear, way)} if way else {})
    monkeypatch.setattr(linear, "WORTH_WIDENING", 3)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*sizes, generator=generator).to(dtype) for sizes in ((4, 3, 20), (7, 20)))
    for turned in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[0], lambda x: x[:0]):  # an expert may have no rows
        found, expected = (with_gradients(lambda x, w, form=form, turned=turned: form(turned(x), w), [x, weight])
                           for form in (ops.linear, torch.nn.functional.linear))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    found, expected = (with_gradients(lambda x, form=form: form(x, weight), [x])[1]
                       for form in (ops.linear, torch.nn.functional.linear))
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])  # of a frozen matrix


@pytest.mark.parametrize(("cpuinfo", "taken"), [
    ("GenuineIntel avx2 avx512f", {torch.bfloat16: "WIDENED"}), ("GenuineIntel avx2 avx512f avx512_bf16", {}),
    ("AuthenticAMD avx2 avx512_bf16", {torch.float32: "ONE_DNN"}),
    ("AuthenticAMD avx2", {torch.float32: "ONE_DNN", torch.bfloat16: "WIDENED"}), ("ARM asimd bf16", {}), ("", {})])
def test_the_processor_decides_how_it_multiplies(monkeypatch, cpuinfo, taken):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert linear.methods_of(set(cpuinfo.split())) == {dtype: getattr(linear, way) for dtype, way in taken.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_cross_entropy_by_rows_is_the_plain_one(monkeypatch, dtype, overwrite, transposed):
    monkeypatch.setitem(importlib.import_module("modellink.kernels.ops.cross_entropy").WIDE, "cpu", 2 * 33)
    generator = torch.Generator().manual_seed(2)
    logits = (5 * torch.randn(3, 5, 33, generator=generator)).to(dtype)
    labels = torch.randint(0, 33, (5, 3) if transposed else (3, 5), generator=generator)
    plain = importlib.import_module("modellink.kernels.ops.cross_entropy").plain

    def turned(x):
        return x.transpose(0, 1) if transposed else x

    def one(x, form):
        x = x.clone().requires_grad_()
        logits = x * 1.0
        losses = form(turned(logits))
        (gradient,) = torch.autograd.grad(losses, x, torch.linspace(-1, 1, 15).view_as(losses))
        return losses.detach(), gradient, logits.detach()

    losses, gradient, after = one(logits, lambda x: ops.cross_entropy(x, labels, overwrite=overwrite))
    expected, of_plain, before = one(logits, lambda x: plain(x, labels))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, of_plain, atol=TOLERANCE[dtype], rtol=0)
    assert torch.equal(after, before) != overwrite


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(7, 2, heads, 8, generator=generator) for heads in (6, 3, 3))


def test_attention_is_the_textbook_formula(qkv):
    query, key, value = qkv
    expected = torch.zeros_like(query)
    for i in range(7):
        for batch in range(2):
            for head in range(6):
                scores = torch.stack([query[i, batch, head] @ key[j, batch, head // 2] * 0.3 for j in range(i + 1)])
                expected[i, batch, head] = scores.softmax(0) @ value[: i + 1, batch, head // 2]
    torch.testing.assert_close(ops.attention(query, key, value, Variant(0.3)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", [
    Variant(0.3, window=3), Variant(0.3, softcap=0.7), Variant(0.3, slopes=alibi_slopes(6)),
    Variant(0.3, window=2, softcap=0.7, slopes=alibi_slopes(6))], ids=["window", "softcap", "alibi", "all"])
@pytest.mark.parametrize("dim", [8, 5])
def test_attention_variants_are_their_formulas(qkv, variant, dim):
    query, key, value = qkv
    value = value[..., :dim]
    expected = torch.zeros(7, 2, 6, dim)
    for i in range(7):
        seen = range(max(0, i - variant.window + 1) if variant.window else 0, i + 1)
        for batch in range(2):
            for head in range(6):
                scores = torch.stack([query[i, batch, head] @ key[j, batch, head // 2] * 0.3 for j in seen])
                if variant.softcap:
                    scores = variant.softcap * torch.tanh(scores / variant.softcap)
                if variant.slopes is not None:
                    scores = scores + variant.slopes[head] * torch.tensor([j - i for j in seen])
                expected[i, batch, head] = scores.softmax(0) @ value[seen.start:i + 1, batch, head // 2]
    for form in (ops.attention, importlib.import_module("modellink.kernels.ops.attention").plain):
        torch.testing.assert_close(form(query, key, value, variant, None), expected, atol=1e-6, rtol=1e-5)
    positions = torch.tensor([[4, 6], [2, 3]])
    new = torch.stack([query[positions[row], row] for row in range(2)], dim=1)
    whole = torch.stack([expected[positions[row], row] for row in range(2)], dim=1)
    torch.testing.assert_close(ops.attention(new, key, value, variant, positions), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", [
    Variant(0.3), Variant(0.3, window=2), Variant(0.3, softcap=0.7), Variant(0.3, slopes=alibi_slopes(6))],
    ids=["plain", "window", "softcap", "alibi"])
def test_packed_documents_see_themselves_alone(qkv, variant):
    rows = [(0, 3, 4, 7), (0, 5, 7)]
    starts = torch.tensor([[start for start, end in pairwise(row) for _ in range(start, end)] for row in rows])
    packed = replace(variant, documents=Documents(starts))
    assert packed.documents.ends == [3, 4, 7, 12, 14]
    for form in (ops.attention, importlib.import_module("modellink.kernels.ops.attention").plain):
        out = form(*qkv, packed, None)
        for number, row in enumerate(rows):
            for start, end in pairwise(row):
                alone = form(*(x[start:end, number:number + 1] for x in qkv), variant, None)
                torch.testing.assert_close(out[start:end, number:number + 1], alone, atol=1e-6, rtol=1e-5)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -power for power in range(1, 9)]
    extra = [2.0 ** -0.5, 2.0 ** -1.5, 2.0 ** -2.5, 2.0 ** -3.5]  # every second slope of 16 heads
    assert alibi_slopes(12).tolist() == pytest.approx([2.0 ** -power for power in range(1, 9)] + extra)


def test_attention_over_a_cache_sees_up_to_each_rows_position(qkv):
    query, key, value = qkv
    whole = ops.attention(query, key, value, Variant(0.3))
    positions = torch.tensor([[5], [3]])
    new = torch.stack([query[5, 0], query[3, 1]]).unsqueeze(0)
    out = ops.attention(new, key, value, Variant(0.3), positions)
    torch.testing.assert_close(out[0], torch.stack([whole[5, 0], whole[3, 1]]), atol=1e-6, rtol=1e-5)


def test_positions_that_change_in_place_are_looked_at_again(qkv):
    """The bias made from the positions is cached for the other layers of a pass only."""
    _, key, value = qkv
    new, positions = qkv[0][:2], torch.tensor([[4, 5], [2, 3]])
    plain = importlib.import_module("modellink.kernels.ops.attention").plain
    for change in range(2):
        for variant in (Variant(0.3), Variant(0.3, window=2), Variant(0.3, slopes=alibi_slopes(6))):
            for end in (7, 6):
                q, k, v = (x.double() if change else x for x in (new, key[:end], value[:end]))
                torch.testing.assert_close(ops.attention(q, k, v, variant, positions), plain(q, k, v, variant, positions),
                                           atol=1e-6, rtol=1e-5)
        positions += 1 - change


def test_a_mask_too_large_to_be_repeated_is_not(qkv, monkeypatch):
    attention = importlib.import_module("modellink.kernels.ops.attention")
    monkeypatch.setattr(attention, "_packed_bias", None)
    monkeypatch.setattr(attention, "_PACKED", 2 * 2 * 7 * 2 - 1)  # heads of a group, batch, keys, queries
    positions = torch.tensor([[4, 5], [2, 3]])
    for variant in (Variant(0.3), Variant(0.3, window=2), Variant(0.3, slopes=alibi_slopes(6))):
        args = (qkv[0][:2], *qkv[1:], variant, positions)
        torch.testing.assert_close(ops.attention(*args), attention.plain(*args), atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(attention, "_PACKED", 2 * 2 * 7 * 2)
    with pytest.raises(TypeError):  # now it is cached
        ops.attention(*args)


def test_the_mask_of_a_pass_is_made_once(qkv, monkeypatch):
    attention = importlib.import_module("modellink.kernels.ops.attention")
    made, make, held = [], attention._bias, len(attention._biases)
    monkeypatch.setattr(attention, "_bias", lambda *args: made.append(args) or make(*args))
    with torch.inference_mode():
        positions = torch.tensor([[4, 5], [2, 3]])
        for _ in range(5):
            ops.attention(qkv[0][:2], *qkv[1:], Variant(0.3), positions)
    assert len(made) == 1
    del positions, made[:]
    assert len(attention._biases) == held  # no longer than the pass


def test_rotary_turns_pairs_and_leaves_the_rest():
    x = torch.randn(3, 1, 2, 6)
    angle = torch.tensor([0.3, 1.1]).repeat(2)
    out = ops.rotary(x, angle.cos().expand(3, 1, 1, 4), angle.sin().expand(3, 1, 1, 4))
    assert torch.equal(out[..., 4:], x[..., 4:])
    first, second = x[..., 0], x[..., 2]  # dimension 0 is paired with 0 + 4 / 2
    torch.testing.assert_close(out[..., 0], first * math.cos(0.3) - second * math.sin(0.3))
    torch.testing.assert_close(out[..., 2], second * math.cos(0.3) + first * math.sin(0.3))


def test_interleaved_rotary_rotates_adjacent_dimensions():
    x = torch.randn(3, 1, 2, 6)
    angle = torch.tensor([0.3, 1.1]).repeat_interleave(2)
    out = ops.rotary(x, angle.cos().expand(3, 1, 1, 4), angle.sin().expand(3, 1, 1, 4), interleaved=True)
    assert torch.equal(out[..., 4:], x[..., 4:])
    torch.testing.assert_close(out[..., 2], x[..., 2] * math.cos(1.1) - x[..., 3] * math.sin(1.1))
    torch.testing.assert_close(out[..., 3], x[..., 3] * math.cos(1.1) + x[..., 2] * math.sin(1.1))


def test_stretched_frequencies():
    plain = inverse_frequencies(16, 10000.0)
    assert torch.equal(inverse_frequencies(16, 10000.0, Scaling("linear", 4.0)), plain / 4)
    dynamic = Scaling("dynamic", 2.0, original_length=32)
    assert torch.equal(inverse_frequencies(16, 10000.0, dynamic, length=32), plain)
    longer = inverse_frequencies(16, 10000.0, dynamic, length=64)
    torch.testing.assert_close(longer, inverse_frequencies(16, 10000.0 * 3 ** (16 / 14)))
    for scaling in (Scaling("llama3", 8.0, 4096), Scaling("yarn", 8.0, 4096)):
        ratio = plain / inverse_frequencies(16, 10000.0, scaling)
        assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(8) and bool((ratio.diff() >= 0).all())
    assert yarn_scale(40.0, 0.707) == pytest.approx(0.0707 * math.log(40) + 1) and yarn_scale(1.0, 1.0) == 1


@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_follows_torch(decoupled):
    start, generator = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    theirs = torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine, mean, variance = start.clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    for step in range(1, 6):
        grad = torch.randn(5, 3, generator=generator)
        theirs.grad = grad.clone()
        reference.step()
        ops.adamw([mine], [grad.clone()], [mean], [variance], Settings(
            step=step, lr=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, decoupled=decoupled))
        torch.testing.assert_close(mine, theirs.detach(), atol=1e-6, rtol=1e-5)


def test_ring_update_joins_attention_over_parts(qkv):
    query, key, value = qkv
    variant, positions = Variant(0.3), torch.full((2, 7), 6)
    scores = scores_of(query, key, variant, positions=positions)
    parts = []
    for keys in (slice(0, 3), slice(3, 7)):
        lse = scores[..., keys].logsumexp(-1)
        weights = (scores[..., keys] - lse.unsqueeze(-1)).exp()
        out = weights @ value[keys].permute(1, 2, 0, 3).repeat_interleave(2, dim=1)
        parts += [out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)]
    joined, lse = ops.ring_update(*parts)
    torch.testing.assert_close(joined, ops.attention(query, key, value, variant, positions), atol=1e-6, rtol=1e-5)
    nothing = torch.zeros_like(joined), torch.full_like(lse, float("-inf"))
    for a, b in zip(ops.ring_update(*nothing, joined, lse), (joined, lse), strict=True):
        assert torch.equal(a, b)
    assert not ops.ring_update(*nothing, *nothing)[0].isnan().any()


@pytest.mark.parametrize("block", [True, False], ids=["one block", "apart"])
def test_the_fused_grouped_product_is_the_plain_one(block):
    """torch's kernel also runs on a CPU, where the op uses the plain form."""
    module = importlib.import_module("modellink.kernels.ops.grouped_matmul")
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(4, 24, 16, generator=generator).bfloat16()
    weights = [(made[i] if block else made[i].clone()).requires_grad_() for i in range(4)]
    assert (module.as_block(weights).data_ptr() == weights[0].data_ptr()) == block
    x = torch.randn(12, 16, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(12, 24, generator=generator).bfloat16()
    results = []
    for form in (module.plain, module.torch_fused):
        out = form(x, weights, [5, 0, 4, 3])
        results.append([out, *torch.autograd.grad(out, [x, *weights], upstream)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-1, rtol=2e-2)
    assert results[1][3].count_nonzero() == 0  # of the group without rows


def test_a_grouped_product_is_a_product_a_group():
    x, weights = torch.randn(5, 3), [torch.randn(2, 3) for _ in range(3)]
    out = ops.grouped_matmul(x, weights, [2, 0, 3])
    for row, which in enumerate([0, 0, 2, 2, 2]):
        torch.testing.assert_close(out[row], weights[which] @ x[row])
