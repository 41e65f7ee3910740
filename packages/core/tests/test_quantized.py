# SPDX-License-Identifier: Apache-2.0
"""Adapters on frozen weights of 4 and 8 bits: the numbers of the rounded weights, their bytes, and training on them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from ranks import beside

from modellink.core.prepare.prepare import prepare
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra qlora is not installed")
LORA, SFT = beside(__file__, "test_lora"), beside(__file__, "test_sft")
run, made, chats, samples = LORA.run, LORA.made, SFT.chats, SFT.samples
BITS = {"nf4": 4.2, "int8": 8.2}  # a number and its share of the scale of 64 or 256 numbers


def held_and_rounded(folder: str, tp: int, form: str) -> dict[str, Any]:
    """On a rank: logits and adapters' gradients with held weights and with the same weights rounded beforehand, and bytes."""
    import gc

    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.adapters.lora import add_adapters
    from modellink.core.adapters.quantized import Quantized, quantize, quantized
    from modellink.core.config import LoraConfig
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import load_weights
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    before = gc.get_objects()  # what other tests left in this process
    there = set(map(id, before))
    processes.join(find("cpu"), layout := ParallelLayout(tp=tp), seed=1)
    settings = BuildSettings(layout=layout, sequence_parallel=tp > 1, make_vocab_size_divisible_by=8)
    source = open_checkpoint(folder)

    def adapted() -> Any:
        models = build_models(source.spec, settings)
        load_weights(models, source, settings)
        add_adapters(models, source.spec, layout, LoraConfig(lora_target_modules=("linear_qkv", "linear_fc2")), seed=1)
        with torch.no_grad():
            for name, parameter in models[0].named_parameters():
                if ".lora_B." in name:
                    parameter.fill_(0.02)
        return models[0]

    def backward(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        logits.square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    ids, model, rounded = torch.arange(24)[None] * 5 % 131, adapted(), adapted()
    quantize([model], form)
    linears = {name: module.quantized_weight for name, module in model.named_modules() if isinstance(module, Quantized)}
    for name in linears:
        weight = rounded.get_submodule(name).weight
        weight.data.copy_(quantized(weight.data, form).dequantized())
    logits, sizes = model(ids), {held.shape for held in linears.values()}
    gc.collect()
    made = [x for x in gc.get_objects() if id(x) not in there and isinstance(x, torch.Tensor)]
    alive = [x for x in made if x.shape in sizes and x.is_floating_point()]
    known = {parameter.data_ptr() for own in (model, rounded) for parameter in own.parameters()}
    whole = [tuple(x.shape) for x in alive if x.data_ptr() not in known]
    expected = rounded(ids)
    gradients, wanted = backward(model, logits), backward(rounded, expected)
    numbers = sum(held.shape.numel() for held in linears.values())
    return {"linears": len(linears), "logits": logits.equal(expected), "whole": whole,
            "gradients": wanted.keys() == gradients.keys() and all(gradients[name].equal(wanted[name]) for name in wanted),
            "count": len(wanted), "bits": 8 * sum(held.nbytes for held in linears.values()) / numbers}


@pytest.mark.parametrize(("case", "tp", "form", "linears"), [("llama", 1, "nf4", 16), ("llama", 2, "int8", 16),
                                                             ("mixtral", 1, "nf4", 40)])
def test_held_weights_are_the_rounded_ones(pools, made, case, tp, form, linears):
    for found in pools(tp)(held_and_rounded, folder=str(made(case)), tp=tp, form=form):
        assert found["linears"] == linears and found["count"] >= 16
        assert found["logits"] and found["gradients"]
        assert found["whole"] == []  # none is kept for backward
        assert found["bits"] < BITS[form] + 1  # a tiny matrix fills its last block of scales badly


def test_training_goes_on_after_a_stop(run, tmp_path):
    options = {"lora_quantize": "nf4", "lora_dropout": 0.1}
    straight = run(1, **options)
    stopped = run(1, save=str(tmp_path / "a"), exit_interval=2, **options)
    assert stopped + run(1, lora_load=str(tmp_path / "a"), **options) == straight
    assert straight[-1][2] < straight[0][2] - 0.02
    whole = run(1, train_iters=1, lora_dropout=0.1)[0]
    assert whole != straight[0] and whole[2] == pytest.approx(straight[0][2], rel=0.02)


def test_weights_that_learn_are_not_held(tiny, chats):
    with pytest.raises(ModelLinkError, match="--lora-quantize nf4"):
        changes = {"load": str(tiny), "data_path": (str(chats),), "lora_quantize": "nf4"}
        prepare("pretrain", [Layer("test", SFT.OPTIONS | changes)])
