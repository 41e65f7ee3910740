# SPDX-License-Identifier: Apache-2.0
"""Real weights at several layouts: the likelihood of real text, greedy tokens, and a round trip, held against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modellink.ckpt_convert import convert
from modellink.kernels.parallel import ParallelLayout

TP3, TP3PP2 = ParallelLayout(tp=3), ParallelLayout(tp=3, pp=2)
# Mean negative log-likelihood in nats per token of the first 8 windows of 512 tokens of the first 40,000 characters, in fp32,
# without special tokens; computed once with transformers from the weights that examples/quickstart/weights.py makes.
LIKELIHOOD = {"wikitext-2-valid": 2.97058, "tinyshakespeare": 3.84136}
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,",
           "Water boils at a temperature of", "<|im_start|>user\nName three colors.<|im_end|>\n<|im_start|>assistant\n"]


@pytest.fixture(scope="module")
def megatron(smollm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "tp3pp2"
    assert convert(smollm2, folder, to="megatron-core", layout=TP3PP2, verify=True).verified == 182
    return folder


def windows(folder: Path, texts: Path, name: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    text = (texts / f"{name}.txt").read_text(encoding="utf-8")[:40_000]
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    return torch.tensor(ids[: 8 * 512]).view(8, 512)


def likelihood(folder: str, layout: ParallelLayout, ids: torch.Tensor) -> float:
    """On a rank: the mean loss through core's schedule."""
    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.data.batch import Batch
    from modellink.core.methods.pretrain import Pretrain
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import load_weights
    from modellink.core.train.step import run_schedule
    from modellink.kernels.device import find

    processes.join(find("cpu"), layout, seed=1)
    source = open_checkpoint(folder)
    settings = BuildSettings(layout=layout)
    models = build_models(source.spec, settings)
    load_weights(models, source, settings)
    batches = [Batch(row[:-1].unsqueeze(0), row[1:].unsqueeze(0), torch.ones(1, 511)) for row in ids]
    with torch.no_grad():
        found = run_schedule(Pretrain(None), models, lambda: iter(batches), num_microbatches=len(batches), seq_length=511,
                             micro_batch_size=1, forward_only=True)
    return found["loss"].item()


@pytest.mark.parametrize(("source", "layout", "text"), [
    ("smollm2", ParallelLayout(), "wikitext-2-valid"), ("megatron", TP3, "wikitext-2-valid"),
    ("megatron", TP3PP2, "wikitext-2-valid"), ("megatron", TP3, "tinyshakespeare")],
    ids=["hf wikitext", "megatron tp3 wikitext", "megatron tp3 pp2 wikitext", "megatron tp3 shakespeare"])
def test_the_likelihood_of_real_text(request, ranks, real_data, smollm2, source, layout, text):
    ids = windows(smollm2, real_data / "text", text)
    folder = request.getfixturevalue(source)
    (loss, *others) = ranks(layout.world_size)(likelihood, folder=str(folder), layout=layout, ids=ids)
    assert loss == pytest.approx(LIKELIHOOD[text], abs=1e-4)
    assert set(others) <= {loss}


def generated(folder: str, layout: ParallelLayout, prompts: list[list[int]]) -> list[list[int]]:
    """On a rank: 64 greedy tokens."""
    from modellink.infer import load

    engine = load(folder, layout=layout, device="cpu", dtype=torch.float32)
    return [answer.token_ids for answer in engine.generate(prompts, max_new_tokens=64, ignore_eos=True)]


@pytest.mark.parametrize(("source", "layout"), [("smollm2", ParallelLayout()), ("megatron", TP3)], ids=["hf", "megatron tp3"])
def test_greedy_tokens_equal_transformers(request, ranks, greedy, smollm2, source, layout):
    prompts, expected = greedy
    results = ranks(layout.world_size)(generated, folder=str(request.getfixturevalue(source)), layout=layout, prompts=prompts)
    assert all(result == expected for result in results)


@pytest.fixture(scope="module")
def greedy(smollm2) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and the 64 tokens that transformers' generate gives in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    answers = [model.generate(row := torch.tensor([ids]), attention_mask=torch.ones_like(row), max_new_tokens=64,
                              do_sample=False)[0, len(ids):].tolist() for ids in prompts]
    return prompts, answers


TWENTY = [*PROMPTS, "2 + 2 =", "In 1969,", "Dear Sir or Madam,", "import numpy as np\n", "List three fruits:", "Je m'appelle",
          "The quick brown fox jumps over the lazy dog and then", "Q: Who wrote Hamlet?\nA:", "She said", "A recipe:", "My",
          "To be or not to be", "Once", "The largest planet of the solar system is", "Photosynthesis is a process in plants " * 6]


@pytest.fixture(scope="module", params=[1, 4], ids=["greedy", "beam 4"])
def decoded(request, smollm2) -> tuple[list[list[int]], list[list[int]], int]:
    """Token ids of twenty prompts, the 16 tokens that transformers gives in fp32 with so many beams, and their number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in TWENTY]
    answers = [model.generate(row := torch.tensor([ids]), attention_mask=torch.ones_like(row), max_new_tokens=16, do_sample=False,
                              num_beams=request.param)[0, len(ids):].tolist() for ids in prompts]
    return prompts, answers, request.param


def decode(folder: str, layout: ParallelLayout, prompts: list[list[int]], beams: int, native: bool) -> list[list[int]]:
    """On a rank: the prompts in one mixed batch, or each by beams."""
    from modellink.infer import load

    engine = load(folder, layout=layout, device="cpu", dtype=torch.float32, native=native)
    return [answer.token_ids for answer in engine.generate(prompts, max_new_tokens=16, ignore_eos=True, num_beams=beams)]


@pytest.mark.stress
@pytest.mark.parametrize(("layout", "native", "searched"), [
    (ParallelLayout(), False, 20), (ParallelLayout(), True, 20), (TP3, False, 4), (ParallelLayout(pp=2), False, 4)],
    ids=["one rank", "one rank compiled", "tp3", "pp2"])
def test_twenty_prompts(ranks, smollm2, decoded, layout, native, searched):
    """Greedy all in one mixed batch, and on one rank some of them alone; by beams `searched` of them."""
    prompts, expected, beams = decoded
    assert len(prompts) == 20
    sizes = [20, *([1] * 4 if layout.world_size == 1 else [])] if beams == 1 else [2] * (searched // 2)
    start = 0
    for size in sizes:
        stop = start + size
        chosen = {"prompts": prompts[start:stop], "beams": beams, "native": native}
        for found in ranks(layout.world_size)(decode, folder=str(smollm2), layout=layout, **chosen):
            assert found == expected[start:stop]
        start = stop % 20


def test_there_and_back_changes_no_bit(smollm2, megatron, tmp_path):
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    back = tmp_path / "hf"
    convert(megatron, back, to="hf")
    with safe_open(smollm2 / "model.safetensors", "pt") as before, safe_open(back / "model.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # noqa: SIM118 (not a dict)
            assert before.get_tensor(name).equal(after.get_tensor(name)), name
    assert AutoConfig.from_pretrained(back).to_dict() | {"_name_or_path": ""} == (
        AutoConfig.from_pretrained(smollm2).to_dict() | {"_name_or_path": ""})
    text = "Numbers like 2026 are split, émojis 🦊 are not."
    assert AutoTokenizer.from_pretrained(back)(text).input_ids == AutoTokenizer.from_pretrained(smollm2)(text).input_ids
    assert AutoTokenizer.from_pretrained(back).chat_template == AutoTokenizer.from_pretrained(smollm2).chat_template
