# SPDX-License-Identifier: Apache-2.0
"""The compiled step computes what core's model computes; a model that it does not support runs core's model.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside

from modellink.ckpt_convert.layer import LayerSpec
from modellink.ckpt_convert.spec import ModelSpec
from modellink.infer import load
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
MODELS = beside(str(Path(__file__).parents[2] / "core/tests/models.py"), "models")
PROMPTS = [torch.randint(3, 379, (length,), generator=torch.Generator().manual_seed(length)).tolist()
           for length in (1, 40, 17, 90)]
SUPPORTED = {"llama", "llama tied", "llama llama3", "llama llama3 tied", "llama linear", "qwen2",
             "qwen2 tied", "qwen2 yarn", "mistral", "mistral window", "gemma"}


@pytest.fixture(scope="module")
def engine(llama):
    """The llama model with the compiled step."""
    return load(llama, device="cpu", native=True)


@pytest.mark.parametrize(("compiled_seconds", "model_seconds"), [(1.0, 2.0), (2.0, 1.0)])
def test_it_is_used_if_it_is_faster(engine, llama, monkeypatch, capsys, compiled_seconds, model_seconds):
    from modellink.infer.native import measure
    seconds = iter([compiled_seconds, model_seconds])
    monkeypatch.setattr(measure, "seconds_per_token", lambda run, cache: next(seconds))
    network = load(llama, device="cpu", native=None, show=True).network
    assert len(network.fast_paths) == (compiled_seconds < model_seconds)
    assert f"{1e3 * compiled_seconds:.1f} ms per token compiled" in capsys.readouterr().err


def test_a_measurement_runs_a_few_decode_passes(engine):
    from modellink.infer.native import measure
    network, ran = engine.network, []
    cache = network.make_cache(max_sequences=1, max_chunk=32, tokens=measure.CACHE_TOKENS)
    assert measure.seconds_per_token(lambda work: ran.append(work) or network.logits(work), cache) > 0
    assert [work.positions.tolist() for work in ran] == [[0], [1],
                                                         [2]] and all(work.is_decode for work in ran)
    assert all(pool.used == 0 for pool in cache.pools)


def logits(network: Any, prompts: list[list[int]], size: int = 11) -> torch.Tensor:
    """Return the logits after prefill chunks of `size` tokens of each prompt, then after all last tokens in
    one pass."""
    from modellink.infer.pages import CachedSequence, Chunk
    from modellink.infer.passes import Pass
    cache = network.make_cache(max_sequences=len(prompts), max_chunk=64, tokens=1024)
    sequences = [CachedSequence(list(prompt)) for prompt in prompts]
    found = []
    for sequence in sequences:
        cache.tables.admit(sequence, shared=False)
        assert cache.tables.grow(sequence, len(sequence.tokens))
        while sequence.computed < len(sequence.tokens) - 1:
            chunk = Chunk(sequence, sequence.computed,
                          min(size, len(sequence.tokens) - 1 - sequence.computed))
            found.append(network.logits(Pass.after_each(cache, [chunk])))
            cache.tables.advance(sequence, chunk.count, shared=False)
    last = [Chunk(sequence, sequence.computed, 1) for sequence in sequences]
    return torch.cat([*found, network.logits(Pass.after_each(cache, last))])


@torch.inference_mode()
def both(network: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the compiled step and of core's model."""
    (step,) = network.fast_paths
    compiled = logits(network, prompts)
    network.fast_paths = []
    model = logits(network, prompts)
    network.fast_paths = [step]
    return compiled, model


@pytest.mark.parametrize("case", MODELS.TRANSFORMERS)
def test_it_computes_what_the_model_computes(tmp_path, case):
    MODELS.make(case, tmp_path)
    network = load(tmp_path / "weights", device="cpu", native=True).network
    assert len(network.fast_paths) == (case in SUPPORTED)
    if network.fast_paths:
        shortened = [[token % 131 for token in prompt][-50:] for prompt in PROMPTS]
        torch.testing.assert_close(*both(network, shortened), atol=1e-5, rtol=1e-4)


def test_other_layouts_and_precisions_are_not_supported(engine):
    from modellink.infer.native.model import supports
    cpu, one = torch.device("cpu"), ParallelLayout()
    assert supports(engine.spec, one, cpu, torch.float32) and supports(engine.spec, one, cpu, torch.bfloat16)
    assert not supports(engine.spec, ParallelLayout(tp=2), cpu, torch.float32)
    assert not supports(engine.spec, one, cpu, torch.float16)


UNSUPPORTED: list[dict[str, Any]] = [
    {"post_norm": True}, {"normalization": "LayerNorm"}, {"gated_linear_unit": False}, {"add_mlp_bias": True},
    {"add_dense_bias": True}, {"position_embedding_type": "alibi"}, {"num_experts": 4},
    {"position_embedding_type": "learned_absolute"}, {"attn_logit_softcapping": 3.0}, {"scale_depth": 1.4},
    {"output_logit_softcapping": 5.0}, {"output_multiplier_scale": 0.5}, {"embed_layernorm": True},
    {"rope_scaling_type": "dynamic", "original_max_position_embeddings": 64, "rope_scaling_factor": 2.0},
    {"layer_windows": (8, 0, 8)}, {"sliding_window": 8, "window_attn_skip_freq": 2},
    {"layer_rotary_bases": (10000.0, 0.0, 10000.0)}, {"layer_rotary_bases": (10000.0, 500.0, 10000.0)}]


@pytest.mark.parametrize("changes", UNSUPPORTED, ids=str)
def test_other_layers_and_surroundings_are_not_supported(engine, changes):
    from modellink.infer.native.model import supports
    cpu, one = torch.device("cpu"), ParallelLayout()
    assert not supports(dataclasses.replace(engine.spec, **changes), one, cpu, torch.float32)


@pytest.mark.parametrize("changes", [
    {"layer_windows": (8, 8, 8)}, {"layer_windows": (0, 0, 0)}, {"layer_rotary_bases": (500.0, 500.0, 500.0)},
    {"sliding_window": 8, "window_attn_skip_freq": 7}], ids=str)
def test_layers_that_are_alike_are_supported(engine, changes):
    from modellink.infer.native.model import supports
    cpu, one = torch.device("cpu"), ParallelLayout()
    assert supports(dataclasses.replace(engine.spec, **changes), one, cpu, torch.float32)


def test_a_layer_with_an_unknown_field_is_not_supported(engine):
    from modellink.infer.native.model import _supports_layer
    layer = engine.spec.layer(0)
    assert _supports_layer(layer)
    kind = dataclasses.make_dataclass("Layer", [("feature", bool)], bases=(LayerSpec,), frozen=True)
    assert not _supports_layer(kind(**vars(layer), feature=False))


def test_the_tables_of_fields_are_complete():
    """Every field of a layer is in one of them; a new one is refused until someone decides."""
    from modellink.infer.native import model
    of_layers = {field.name for field in dataclasses.fields(LayerSpec)}
    of_models = {field.name for field in dataclasses.fields(ModelSpec)}
    assert of_layers == model.ANY_VALUE | model.SUPPORTED.keys()
    assert not model.ANY_VALUE & model.SUPPORTED.keys()
    assert of_models > model.AROUND_LAYERS | model.IN_LAYERS


def test_bf16_is_as_close_to_fp32_as_the_model(llama, engine):
    half = load(llama, device="cpu", dtype="bfloat16", native=True).network
    exact = both(engine.network, PROMPTS)[1].log_softmax(-1)
    compiled, model = (found.log_softmax(-1) for found in both(half, PROMPTS))
    # its activations are fp32
    assert (compiled - exact).square().mean() < 1.1 * (model - exact).square().mean()


def test_tokens_are_the_same_with_and_without_it(llama, engine, prompts):
    plain = load(llama, device="cpu")
    assert engine.network.fast_paths and not plain.network.fast_paths
    assert plain.generate(prompts, max_new_tokens=40) == engine.generate(prompts, max_new_tokens=40)


def test_int8_is_close_and_prints_its_error(llama, engine, capsys):
    quantized = load(llama, device="cpu", int8=True, show=True)
    (step,) = quantized.network.fast_paths
    assert 0.001 < step.error < 0.02
    assert f"{100 * step.error:.2f} %" in capsys.readouterr().err
    window = torch.randint(3, 379, (1, 120), generator=torch.Generator().manual_seed(0)).tolist()
    exact, near = (torch.tensor(one.score(window)[0]) for one in (engine, quantized))
    assert 0 < (exact - near).abs().mean() < 0.3 * exact.std()


@pytest.mark.parametrize("case", ["llama", "llama tied", "qwen2", "mistral window"])
def test_the_model_computes_with_the_int8_values_too(tmp_path, case):
    MODELS.make(case, tmp_path)
    exact, quantized = (load(tmp_path / "weights", device="cpu", native=True, int8=int8).network
                        for int8 in (False, True))
    prompts = [[token % 131 for token in prompt][-50:] for prompt in PROMPTS]
    compiled, model = both(quantized, prompts)
    torch.testing.assert_close(compiled, model, atol=1e-5, rtol=1e-4)
    assert (model - both(exact, prompts)[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_weights_replace_the_others(folder, family):
    """Except the embedding. Counts the bytes of tensors."""
    plain, quantized = (load(folder(family), device="cpu", int8=int8).network for int8 in (False, True))
    full, left = (sum(parameter.nbytes for parameter in network._model.parameters())
                  for network in (plain, quantized))
    spec, (step,) = plain.spec, quantized.fast_paths
    embedding = 4 * spec.vocab_size * spec.hidden_size
    int8_bytes = sum(tensor.nbytes for tensor in step._held)
    assert embedding <= left < embedding + 0.05 * full  # and the norms and biases
    assert int8_bytes < 0.32 * full + (embedding / 4 if spec.tied else 0)
    with torch.inference_mode():
        quantized.run_model(torch.tensor([[5, 6]]))
    assert left == sum(parameter.nbytes for parameter in quantized._model.parameters())


def test_the_quantization_error_is_at_most_half_a_step():
    from modellink.infer.native.int8 import Int8Matrix
    weight = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    quantized = Int8Matrix.quantize(weight)
    assert ((quantized.dequantize(torch.float32) - weight).abs() <= 0.5001 * quantized.scale[:, None]).all()
    assert quantized.values.abs().max() == 127


@pytest.fixture
def uncached():
    """Lets a test change what the compiled step is built from."""
    from modellink.infer.native import compiled
    compiled.step.cache_clear()
    yield compiled
    compiled.step.cache_clear()


def test_a_user_without_a_home_folder_has_no_step(monkeypatch, uncached):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_
                                               for _ in ()).throw(RuntimeError("Could not determine home "
                                                                               "directory.")))
    assert uncached.step() is None


@pytest.mark.parametrize("environment", [{"MODELLINK_NATIVE": "0"}, {"CC": "no-such-compiler"},
                                         {"CC": "false"}])
def test_without_a_compiler_the_model_runs(llama, monkeypatch, environment, tmp_path, uncached):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not load(llama, device="cpu", native=True).network.fast_paths
    with pytest.raises(ModelLinkError, match="does not support this model"):
        load(llama, device="cpu", int8=True)
    assert not list(tmp_path.rglob("*.so"))
