# SPDX-License-Identifier: Apache-2.0
"""The plain-PyTorch references of `references/`: every tensor is used, the future is not seen, the tiny sizes differ.

That a reference computes its family is shown in test_references_equal.py.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

checks = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "references" / "checks.py")))
MODULES, CASES, random_tensors, tokens, gradients = (
    checks.MODULES, checks.CASES, checks.random_tensors, checks.tokens, checks.gradients)
SPLIT = ("num_attention_heads", "num_key_value_heads", "multi_query_group_num", "intermediate_size", "ffn_hidden_size",
         "num_experts")
WHOLE = ("vocab_size", "padded_vocab_size", "hidden_size", "kv_channels", "max_position_embeddings", "seq_length")


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_tensor_is_used(family: str, name: str) -> None:
    module = MODULES[family]
    config = module.TINY[name]
    tensors = random_tensors(module, config)
    logits = module.logits(config, tensors, tokens(60))  # enough of them for every expert to be chosen
    assert logits.shape == (2, 60, 131)
    assert logits.dtype == torch.float32
    for tensor, gradient in gradients(logits, tensors).items():
        assert gradient.abs().max() > 1e-6, tensor


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_future_is_not_seen(family: str, name: str) -> None:
    module = MODULES[family]
    config = module.TINY[name]
    tensors = random_tensors(module, config)
    ids = tokens()
    changed = ids.clone()
    changed[:, 13] = (ids[:, 13] + 1) % 131
    before, after = (module.logits(config, tensors, each).detach() for each in (ids, changed))
    torch.testing.assert_close(before[:, :13], after[:, :13], atol=1e-6, rtol=0)
    assert all((before[:, at] - after[:, at]).abs().max() > 1e-3 for at in (13, 14, 23))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_no_two_sizes_coincide_and_each_splits_in_two(family: str, name: str) -> None:
    config = MODULES[family].TINY[name]
    split = [config[key] for key in SPLIT if key in config]
    whole = [config[key] for key in WHOLE if key in config] + [config.get("num_layers") or config["num_hidden_layers"]]
    assert len({*split, *whole}) == len(split + whole)
    assert all(size % 2 == 0 for size in split)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_constants_of_released_files_are_no_parameters(family: str, name: str) -> None:
    module = MODULES[family]
    config = module.TINY[name]
    constants = module.buffers(config) if hasattr(module, "buffers") else {}
    assert not constants.keys() & module.shapes(config).keys()
    assert all(name.endswith("inv_freq") for name in constants)
