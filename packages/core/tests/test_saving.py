"""Runs of all architectures are saved whole: they go on elsewhere as if they had not stopped, and become what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modellink.core.testing import beside

MODELS, PARITY = beside(__file__, "models"), beside(__file__, "test_parity")
train = beside(__file__, "test_training").train
OPTIONS = {"train_iters": 3, "lr": 1e-5, "lr_warmup_iters": 0, "global_batch_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("case", PARITY.VARIED)
def test_every_weight_is_saved_and_goes_on(pools, corpus, tmp_path, case):
    from modellink.ckpt_convert import convert, open_checkpoint

    MODELS.make(case, tmp_path)
    texts: dict[str, Any] = OPTIONS | {"load": str(tmp_path / "weights"), "data_path": (str(corpus),)}
    longest = open_checkpoint(tmp_path / "weights").spec.max_position_embeddings
    texts["seq_length"] = min(24, longest)
    straight = pools(1)(train, options=texts)[-1]
    pools(2)(train, options=texts | TP2 | {"save": str(tmp_path / "saved"), "exit_interval": 2})
    resumed = pools(2)(train, options=texts | PP2 | {"load": str(tmp_path / "saved")})[-1]
    assert [step[2] for step in resumed] == pytest.approx([straight[2][2]], rel=1e-5)

    convert(tmp_path / "saved", tmp_path / "back", to="hf")
    before, after = (open_checkpoint(Path(tmp_path / name)) for name in ("weights", "back"))
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        rows = [range(tensor.shape[0])]
        moved = (after.read(name, rows, 0) - before.read(name, rows, 0)).abs().max()
        assert moved < 1e-3, name  # two small steps, not random numbers
    assert any(not torch.equal(before.read(name, [range(tensor.shape[0])], 0), after.read(name, [range(tensor.shape[0])], 0))
               for name, tensor in before.tensors.items())
